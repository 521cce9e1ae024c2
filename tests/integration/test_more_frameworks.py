"""
Frameworks that are more than an app: NiceGUI, Gradio, FastMCP, dishka, grpc.aio and Celery.

Those that change their process run in one of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import httpx2
import pytest
from dishka import Provider, Scope, make_async_container, provide
from dishka.integrations.fastapi import DishkaRoute, FromDishka, setup_dishka
from fastapi import APIRouter, FastAPI
from fastmcp import Context, FastMCP
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from playwright.sync_api import Page, sync_playwright

from aioserve import Server, serving
from tests.helpers.programs import Program
from tests.integration.conftest import program
from tests.integration.frameworks import Play, end_sse_starlettes_watcher
from tests.integration.test_browser import ARGUMENTS

pytestmark = pytest.mark.timeout(180)  # browsers and large packages take seconds to start

FOLDER = "tests.integration.frameworks"


def assert_nothing_was_forced(server: Server) -> None:
    assert server.report is not None
    assert not server.report.was_forced


@contextlib.contextmanager
def browser_at(url: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program("chromium", "chromium"), args=ARGUMENTS)
        try:
            page = browser.new_page()
            page.goto(url)
            yield page
        finally:
            browser.close()


# NiceGUI


def test_nicegui_button_stops_its_server_and_the_page_is_disconnected_at_once() -> None:
    """With the default options; for one server after the other."""
    with Program("-m", f"{FOLDER}.with_nicegui", warnings_are_errors=False) as child:
        for _ in range(2):
            with browser_at(child.wait_for("http://")) as page:
                child.wait_for("connected")
                page.get_by_text("Stop").click()
                child.wait_for("left:")
        code, err = child.end()
    assert (code, err) == (0, "")
    once = ["startup", "http://127.0.0.1:8000", "connected", "disconnected", "shutdown", "forced: False"]
    # What python-socketio leaves in the loop: its service, and a task for each client.
    left = "left: AsyncServer._service_task AsyncSocket._send_ping"
    assert child.masked[: 2 * len(once) + 2] == [*once, left] * 2


def test_nicegui_shuts_down_a_server_that_it_was_given_and_does_not_serve_two_at_once() -> None:
    """`app.shutdown()` looks for uvicorn's server."""
    with Program("-m", f"{FOLDER}.with_nicegui", warnings_are_errors=False) as child:
        for _ in range(2):
            with browser_at(child.wait_for("http://")) as page:
                page.get_by_text("Stop").click()
                child.wait_for("left:")
        code, err = child.end()
    assert (code, err) == (0, "")
    rest = child.said[child.said.index("shutdown() knows no server") :]
    assert [line for line in rest if line not in {"startup", "shutdown"}] == [
        "shutdown() knows no server",
        "two at once",
        "two at once fail to shut down",
    ]


# Gradio


def test_gradio_page_in_a_browser_does_not_hold_the_stop() -> None:
    """Its heartbeat and its results are event streams; the function is cancelled by `Blocks.close()`."""
    with Program("-m", f"{FOLDER}.with_gradio", "browser", warnings_are_errors=False) as child:
        with browser_at(f"{child.wait_for('http://')}/ui/") as page:
            page.get_by_role("button", name="Greet").click()
            child.wait_for("both streams are open")
            child.send(signal.SIGTERM)
            code, err = child.end()
    assert code == 0, err
    assert child.said[2:] == ["the lifespan ends", "forced: False", "the function is cancelled", "left:"]


def test_call_of_gradios_own_client_is_answered_during_a_stop() -> None:
    """Its heartbeat is disconnected by `disconnect_after`."""
    with Program("-m", f"{FOLDER}.with_gradio", "client", warnings_are_errors=False) as child:
        code, err = child.end()
    assert code == 0, err
    assert child.said[1:] == ["the lifespan ends", "hello Ada", "forced: False", "left:"]


def test_heartbeat_of_gradios_own_client_lasts_until_the_timeout() -> None:
    """It does not accept event streams, so it is a stream like any other."""
    with Program("-m", f"{FOLDER}.with_gradio", "forced", warnings_are_errors=False) as child:
        code, err = child.end()
    assert code == 0, err
    assert "1 handler disconnected" in err
    assert "/gradio_api/heartbeat/" in err
    assert child.said[1:] == ["the lifespan ends", "hello Ada", "forced: True", "left:"]


def test_gradios_queue_goes_on_unless_its_blocks_are_closed() -> None:
    with Program("-m", f"{FOLDER}.with_gradio", "forgotten", warnings_are_errors=False) as child:
        code, err = child.end()
    assert code == 0, err
    assert child.said[-1] == "left: Queue.start_processing Queue.start_progress_updates"


# FastMCP


def make_fastmcp(play: Play) -> FastMCP:
    @asynccontextmanager
    async def lifespan(server: FastMCP) -> AsyncIterator[None]:
        play.note("begun")
        yield
        play.note("ended")

    mcp = FastMCP("for tests", lifespan=lifespan)

    @mcp.tool
    async def work(ctx: Context) -> str:
        try:
            await play.hold()
        except asyncio.CancelledError:
            play.note("cancelled")
            raise
        return "worked"

    return mcp


@asynccontextmanager
async def connected(server: Server, mode: str) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(trust_env=False, timeout=30) as http:
        async with Client(streamable_http_client(f"{server.url}/mcp", http_client=http), mode=mode) as client:
            await client.list_tools()  # else it would do so behind its first call
            yield client


@pytest.fixture
async def sse_starlettes_watcher_ends(nothing_is_left_in_the_loop: None) -> AsyncIterator[None]:
    yield
    await end_sse_starlettes_watcher()


@pytest.mark.usefixtures("sse_starlettes_watcher_ends")
@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_fastmcp_call_in_flight_is_answered_during_a_stop(mode: str, loop_name: str) -> None:
    """The stream of a session ends at once; the same app can be served again."""
    play = Play()
    app = make_fastmcp(play).http_app()
    for _ in range(2):
        async with serving(app, shutdown_timeout=None) as server, connected(server, mode) as client:
            play.holding.clear()
            calling = asyncio.create_task(client.call_tool("work"))
            await play.holding.wait()
            server.close()
            play.release()
            assert (await calling).structured_content == {"result": "worked"}
            await server.wait_closed()
        assert_nothing_was_forced(server)
    assert play.events == ["begun", "ended"] * 2


@pytest.mark.usefixtures("sse_starlettes_watcher_ends", "short_grace")
async def test_fastmcp_call_that_exceeds_the_timeout_is_cancelled(loop_name: str) -> None:
    play = Play()
    async with serving(make_fastmcp(play).http_app(), shutdown_timeout=0.05) as server:
        async with connected(server, "auto") as client:
            calling = asyncio.create_task(client.call_tool("work"))
            await play.holding.wait()
            await server.aclose()
            await asyncio.wait({calling})
            assert calling.exception() is not None
    assert play.events == ["begun", "cancelled", "ended"]


# dishka


class Pool:
    pass


class Connection:
    pass


class Recording(Provider):
    def __init__(self, play: Play) -> None:
        super().__init__()
        self.play = play

    @provide(scope=Scope.APP)
    async def pool(self) -> AsyncIterator[Pool]:
        self.play.note("pool opened")
        yield Pool()
        self.play.note("pool closed")

    @provide(scope=Scope.REQUEST)
    async def connection(self, pool: Pool) -> AsyncIterator[Connection]:
        error = yield Connection()
        self.play.note(f"connection closed: {type(error).__name__}")


def make_dishka(play: Play) -> FastAPI:
    router = APIRouter(route_class=DishkaRoute)

    @router.get("/")
    async def hold(connection: FromDishka[Connection]) -> str:
        await play.hold()
        return "held"

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await container.close()

    app = FastAPI(lifespan=lifespan)
    app.include_router(router)
    container = make_async_container(Recording(play))
    setup_dishka(container, app)
    return app


@pytest.mark.parametrize(("released", "error"), [(True, "NoneType"), (False, "CancelledError")])
async def test_dishka_closes_its_container_after_the_last_request(released: bool, error: str, loop_name: str) -> None:
    """What a request was given is closed with its handler, also if that is cancelled."""
    play = Play()
    async with serving(make_dishka(play), shutdown_timeout=0.1) as server:
        async with httpx.AsyncClient(trust_env=False) as client:
            asking = asyncio.create_task(client.get(server.url))
            await play.holding.wait()
            server.close()
            if released:
                play.release()
            await server.wait_closed()
            assert (await asking).status_code == (200 if released else 500)
    assert play.events == ["pool opened", f"connection closed: {error}", "pool closed"]


# grpc.aio


class Greeter(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, play: Play) -> None:
        self.play = play

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self.greet)

    async def greet(self, request: bytes, context: object) -> bytes:
        await self.play.hold()
        return b"hello " + request


def make_grpc(play: Play) -> tuple[grpc.aio.Server, FastAPI]:
    """Return a server of grpc.aio, and an app that asks it."""
    greeter = grpc.aio.server()
    greeter.add_generic_rpc_handlers([Greeter(play)])
    port = greeter.add_insecure_port("127.0.0.1:0")
    app = FastAPI()

    @app.get("/")
    async def ask() -> str:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                return bytes(await channel.unary_unary("/greeter/greet")(b"Ada")).decode()
            except grpc.aio.AioRpcError as exc:
                return str(exc.code().name)

    return greeter, app


@pytest.fixture
def grpcs_thread_ends() -> Iterator[None]:
    """Collect what belongs to a loop's calls: their thread and its descriptors end with the last object of grpc.aio."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    deadline = time.monotonic() + 10
    while not set(os.listdir("/proc/self/fd")) <= before and time.monotonic() < deadline:  # nothing tells when
        time.sleep(0.01)
        gc.collect()


@pytest.mark.parametrize("loop_name", ["asyncio"])
@pytest.mark.usefixtures("grpcs_thread_ends")
async def test_grpc_server_around_the_block_outlives_the_requests_that_need_it(loop_name: str) -> None:
    play = Play()
    greeter, app = make_grpc(play)
    await greeter.start()
    async with serving(app, shutdown_timeout=None) as server, httpx.AsyncClient(trust_env=False) as client:
        asking = asyncio.create_task(client.get(server.url))
        await play.holding.wait()
        server.close()
        play.release()
        assert (await asking).json() == "hello Ada"
    await greeter.stop(grace=5)
    assert_nothing_was_forced(server)


@pytest.mark.parametrize("loop_name", ["asyncio"])
@pytest.mark.usefixtures("grpcs_thread_ends")
async def test_grpc_server_that_ends_first_fails_the_requests_that_need_it(loop_name: str) -> None:
    play = Play()
    greeter, app = make_grpc(play)
    await greeter.start()
    async with serving(app) as server, httpx.AsyncClient(trust_env=False) as client:
        asking = asyncio.create_task(client.get(server.url))
        await play.holding.wait()
        await greeter.stop(grace=0)
        assert (await asking).json() == "UNAVAILABLE"


# Celery


def run_worker(mode: str, directory: Path) -> tuple[dict[str, str], list[list[str]], int]:
    """Run a worker until a task was done; return the pids that it has said, by what it said them for."""
    with Program("-m", f"{FOLDER}.with_celery", mode, str(directory), warnings_are_errors=False) as worker:
        worker.wait_for("asked")
        worker.send(signal.SIGTERM)
        code, _ = worker.end()
        assert code == 0
        said = [line.split() for line in worker.said if line.startswith(("ready", "asked", "stopped", "lifespan"))]
        return {words[0]: words[-1] for words in said}, said, worker.process.pid


def test_server_in_celerys_main_process_is_not_in_its_children(tmp_path: Path) -> None:
    """A task, in a child, asks the main process; the worker's signals are left alone."""
    pids, said, main = run_worker("main", tmp_path)
    (asker,) = (words[1] for words in said if words[0] == "asked")
    assert asker != str(main)
    assert pids == dict.fromkeys(["ready", "asked", "lifespan", "stopped"], str(main))


def test_server_in_celerys_main_process_that_nobody_stops_ends_gracefully(tmp_path: Path) -> None:
    pids, _, main = run_worker("main, left", tmp_path)
    assert pids == dict.fromkeys(["ready", "asked", "lifespan"], str(main))


def test_each_process_of_celerys_pool_can_have_a_server(tmp_path: Path) -> None:
    pids, said, main = run_worker("children", tmp_path)
    assert pids.pop("ready") == str(main)
    (child,) = set(pids.values())
    assert child != str(main)
    assert [words[0] for words in said] == ["ready", "asked", "lifespan", "stopped"]


def test_server_in_a_process_of_celerys_pool_that_nobody_stops_does_not_end_gracefully(tmp_path: Path) -> None:
    """Such a process exits without Python's hooks."""
    pids, _, _ = run_worker("children, left", tmp_path)
    assert set(pids) == {"ready", "asked"}


def test_task_of_celery_can_have_a_server(tmp_path: Path) -> None:
    pids, _, main = run_worker("task", tmp_path)
    assert pids["asked"] == pids["lifespan"] != str(main)
