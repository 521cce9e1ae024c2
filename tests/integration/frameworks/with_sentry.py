"""
A program with Sentry, whose transport prints: `python -m tests.integration.frameworks.with_sentry MODE [asyncio]`.

Each mode is a function below; with "asyncio", tasks are watched as well. It is a program of its own because Sentry
changes the process.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sentry_sdk
from fastapi import FastAPI
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations import Integration
from sentry_sdk.integrations.asyncio import AsyncioIntegration
from sentry_sdk.integrations.fastapi import FastApiIntegration
from sentry_sdk.integrations.starlette import StarletteIntegration
from sentry_sdk.transport import Transport

from aioserve import Options, Server, ShutdownError, serving


class Printing(Transport):
    """Print events and transactions, in order."""

    def capture_envelope(self, envelope: Envelope) -> None:
        event, transaction = envelope.get_event(), envelope.get_transaction_event()
        if event is not None:
            values = event["exception"]["values"] if event.get("exception") else []
            names = [value["type"] for value in values]
            program = (event.get("tags") or {}).get("who")
            print("event", event.get("logger"), event.get("transaction"), *names, "who:", program)
        if transaction is not None:
            trace = transaction["contexts"]["trace"]
            handlers = str(transaction["spans"]).count("run_asgi'")
            own = trace["trace_id"] != trace_of_program
            print("transaction", transaction["transaction"], trace.get("status"), "own trace:", own, "runs:", handlers)


trace_of_program = ""
failing = ""
dying = asyncio.Event()
holding = asyncio.Event()
released = asyncio.Event()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    if failing == "startup":
        raise LookupError("at the start")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(die())
        yield
        task.cancel()
    if failing == "shutdown":
        raise LookupError("at the end")


async def die() -> None:
    await dying.wait()
    raise LookupError("meanwhile")


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def root() -> str:
    return "hello"


@app.get("/broken")
async def broken() -> None:
    raise LookupError("no tea today")


@app.get("/hold")
async def hold() -> None:
    holding.set()
    await released.wait()


async def ask(server: Server, path: str) -> None:
    """Ask without a client that Sentry knows."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n".encode())
        await reader.read()
    finally:
        writer.close()


async def requests() -> None:
    async with serving(app) as server:
        await ask(server, "/")
        await ask(server, "/broken")


async def inside(**options: bool) -> None:
    """Inside of a transaction, and behind a tag."""
    global trace_of_program
    both: Options = {"reset_contextvars": options.get("reset", False)}
    sentry_sdk.set_tag("who", "program")
    with sentry_sdk.start_transaction(name="program") as transaction:
        trace_of_program = transaction.trace_id
        async with serving(app, **both) as server:
            await ask(server, "/")
            await ask(server, "/broken")


async def inside_with_reset() -> None:
    await inside(reset=True)


async def forced() -> None:
    async with serving(app, shutdown_timeout=0.05) as server:
        asking = asyncio.create_task(ask(server, "/hold"))
        await holding.wait()
        await server.aclose()
        await asking
    assert server.report is not None
    assert server.report.was_forced


async def gone() -> None:
    async with serving(app, cancel_on_disconnect=True) as server:
        asking = asyncio.create_task(ask(server, "/hold"))
        await holding.wait()
        asking.cancel()
        while server.stats.in_flight:
            await asyncio.sleep(0.01)


async def startup() -> None:
    global failing
    failing = "startup"
    async with serving(app):
        pass


async def shutdown() -> None:
    global failing
    failing = "shutdown"
    try:
        async with serving(app):
            pass
    except ShutdownError:
        print("caught")


async def crash() -> None:
    async with serving(app) as server:
        dying.set()
        await server.wait_closed()


async def both() -> None:
    global failing
    failing = "shutdown"
    try:
        async with serving(app):
            raise ZeroDivisionError
    except ZeroDivisionError:
        print("caught")


async def main() -> None:
    integrations: list[Integration] = [StarletteIntegration(), FastApiIntegration()]
    if "asyncio" in sys.argv:
        integrations.append(AsyncioIntegration())
    sentry_sdk.init(
        "http://key@127.0.0.1/1",
        transport=Printing,
        traces_sample_rate=1,
        integrations=integrations,
        auto_enabling_integrations=False,  # which would import whatever is installed
    )
    await globals()[sys.argv[1]]()


if __name__ == "__main__":
    asyncio.run(main())
