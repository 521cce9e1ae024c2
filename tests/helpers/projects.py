"""
Projects with tests of their own, which use the fixtures of the pytest plugin.
"""

from __future__ import annotations

import pytest

from tests.conftest import WARNINGS_ARE_ERRORS

# In every project: an app that answers with the id of its loop, and can hang, crash or fail to shut down.
APP = """
import asyncio

EVENTS = []


def this_loop():
    return str(id(asyncio.get_running_loop()))


class App:
    def __init__(self, name="app", shutdown="completes"):
        self.name = name
        self.shutdown = shutdown
        self.crash = asyncio.Event()
        self.forever = asyncio.Event()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
            return
        if scope["path"] == "/hang":
            await self.forever.wait()
        if scope["path"] == "/crash":
            self.crash.set()
        more = scope["path"] == "/stream"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": this_loop().encode(), "more_body": more})
        while more and (await receive())["type"] != "http.disconnect":
            pass

    async def lifespan(self, receive, send):
        await receive()
        await send({"type": "lifespan.startup.complete"})
        stop, crash = asyncio.ensure_future(receive()), asyncio.ensure_future(self.crash.wait())
        try:
            await asyncio.wait({stop, crash}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            crash.cancel()
        if self.crash.is_set():
            raise LookupError(f"{self.name} has crashed")
        EVENTS.append(f"{self.name} is closed")
        if self.shutdown == "raises":
            raise LookupError(f"{self.name} could not shut down")
        await send({"type": "lifespan.shutdown.complete"})
"""


# The same tests for every plugin; each checks that its server runs on the loop of the test.
TESTS = """
import pytest
from app import App, this_loop

marked = {mark}


@marked
async def test_a_server_and_clients(aioserve_server, aioserve_client):
    server = await aioserve_server(App(), root_path="/api")
    client, other = await aioserve_client(server), await aioserve_client(server, headers={{"x": "y"}})
    assert (await client.get("/")).text == (await other.get("/")).text == this_loop()
    assert client.base_url == server.url


@marked
async def test_the_next_one_has_its_own(aioserve_client):
    client = await aioserve_client(App())
    assert (await client.get("/")).text == this_loop()


class TestInAClass:
    @marked
    @pytest.mark.parametrize("number", range(2))
    async def test_a_method(self, aioserve_client, number):
        client = await aioserve_client(App())
        assert (await client.get("/")).text == this_loop()


def test_in_between(aioserve_live_server):
    assert aioserve_live_server(App()).is_serving()
"""


NOT_MARKED = "lambda test: test"


ANYIO = "pytest.mark.anyio"


ASYNCIO = "pytest.mark.asyncio"


BACKEND = """
import pytest


@pytest.fixture(scope="{scope}")
def anyio_backend():
    return {backend}
"""


WITHOUT_ASYNCIO = ("-p", "no:asyncio")


WITHOUT_ANYIO = ("-p", "no:anyio")


IN_ORDER = ("-p", "no:randomly")


def run(pytester: pytest.Pytester, *options: str, **files: str) -> pytest.RunResult:
    """Run a project with these files in a process of its own, with warnings as errors."""
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider -rA")
    pytester.makepyfile(app=APP, **files)
    # Without the option, pytest-asyncio warns; and without pytest-asyncio, the option is unknown.
    scope = () if "no:asyncio" in options else ("-o", "asyncio_default_fixture_loop_scope=function")
    return pytester.runpytest_subprocess(*WARNINGS_ARE_ERRORS, *options, *scope)


def run_with_anyio(pytester: pytest.Pytester, module: str, *options: str, **files: str) -> pytest.RunResult:
    """Run one module in its order, with all of its async tests run by anyio's plugin."""
    options = (*WITHOUT_ASYNCIO, *IN_ORDER, "-o", "anyio_mode=auto", *options)
    return run(pytester, *options, conftest=backend(), test_it=module, **files)


def sample(mark: str) -> str:
    return TESTS.format(mark=mark)


def backend(scope: str = "function", backend: str = '"asyncio"') -> str:
    return BACKEND.format(scope=scope, backend=backend)
