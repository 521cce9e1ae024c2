"""
A notebook whose cells start a server, use it, swap its app and close it, in a kernel as its users have it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = pytest.mark.timeout(180)  # a kernel takes seconds to start, and more on a busy machine


class Notebook:
    """A notebook that is written and run cell by cell."""

    def __init__(self, client: NotebookClient) -> None:
        self._client = client

    async def run(self, source: str) -> NotebookNode:
        """Run a new cell, and return it with its outputs."""
        cells = self._client.nb.cells
        cells.append(new_code_cell(source))  # type: ignore[no-untyped-call]
        return await self._client.async_execute_cell(cells[-1], len(cells) - 1)

    async def printed(self, source: str) -> str:
        """Run a new cell, and return what it has printed."""
        return "".join(output.text for output in (await self.run(source)).outputs if output.output_type == "stream")

    async def shown(self, source: str) -> str:
        """Run a new cell, and return the HTML of its value."""
        (output,) = (await self.run(source)).outputs
        return str(output.data["text/html"])

    async def error(self, source: str) -> str:
        """Run a new cell, and return what it has raised."""
        with pytest.raises(CellExecutionError) as caught:
            await self.run(source)
        return f"{caught.value.ename}: {caught.value.evalue}"


@asynccontextmanager
async def notebook() -> AsyncIterator[Notebook]:
    client = NotebookClient(
        new_notebook(),  # type: ignore[no-untyped-call]
        kernel_name="python3",
        timeout=30,
    )
    async with client.async_setup_kernel():
        yield Notebook(client)


FIRST = """
import httpx
from aioserve import Swappable, start
from aioserve.testing import assert_nothing_left
from fastapi import FastAPI

nothing_is_left = assert_nothing_left()
await nothing_is_left.__aenter__()

app = FastAPI()

@app.get("/")
async def hello():
    return "hello from a cell"

swappable = Swappable(app)
server = await start(swappable)
print(server.url)
"""

CALL = """
async with httpx.AsyncClient() as client:
    print((await client.get(server.url)).json())
"""

AGAIN = """
app = FastAPI()

@app.get("/")
async def hello():
    return "hello from another cell"

await swappable.swap(app)
"""

FAILS_TO_START = """
import contextlib

@contextlib.asynccontextmanager
async def lifespan(app):
    raise LookupError("no database")
    yield

await swappable.swap(FastAPI(lifespan=lifespan))
"""

IS_INTERRUPTED = """
import asyncio, os, signal

@contextlib.asynccontextmanager
async def lifespan(app):
    os.kill(os.getpid(), signal.SIGINT)  # as the notebook's stop button does, while the cell waits for this
    await asyncio.Event().wait()
    yield

await swappable.swap(FastAPI(lifespan=lifespan), startup_timeout=None)
"""

# The kernel runs each cell in its own tasks, with its own handler for SIGINT; their lines contain its name.
LAST = """
try:
    await nothing_is_left.__aexit__(None, None, None)
except AssertionError as exc:
    for line in str(exc).splitlines()[1:]:
        if "ipykernel" not in line and "IPythonKernel" not in line:
            print(line)
"""


def test_cells_of_a_notebook_share_a_server() -> None:
    """One cell starts it, others use it, one swaps its app, some fail, and the last one closes it."""

    async def main() -> int:
        async with notebook() as cells:
            url = (await cells.printed(FIRST)).strip()
            link = f'<a href="{url}" target="_blank">{url}</a>'
            assert await cells.shown("server") == f"aioserve.Server {link} <em>serving</em>"
            assert await cells.printed(CALL) == "hello from a cell\n"
            await cells.run(AGAIN)
            assert await cells.printed(CALL) == "hello from another cell\n"

            for source, error in (
                ("await swappable.swap(no_such_app)", "NameError: name 'no_such_app' is not defined"),
                (FAILS_TO_START, "StartupError: the app's lifespan failed to start: LookupError: no database"),
                (IS_INTERRUPTED, "CancelledError: "),
            ):
                assert await cells.error(source) == error
                assert await cells.printed(CALL) == "hello from another cell\n"

            await cells.run("await server.aclose()")
            assert await cells.shown("server") == f"aioserve.Server {url} <em>closed</em>"
            assert await cells.error(CALL) == "ConnectError: All connection attempts failed"
            assert await cells.printed(LAST) == ""
            return int(await cells.printed("print(os.getpid())"))

    kernel = asyncio.run(main())
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def test_kernel_with_a_running_server_can_be_shut_down() -> None:
    """The user has forgotten to close the server, and closes the notebook."""

    async def main() -> int:
        async with notebook() as cells:
            await cells.printed(FIRST)
            assert await cells.printed(CALL) == "hello from a cell\n"
            return int(await cells.printed("import os; print(os.getpid())"))

    kernel = asyncio.run(main())
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)
