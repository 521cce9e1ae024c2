"""
The loop: what it can do is tried once, at the start; a loop that can not do what is needed is refused there.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from websockets.asyncio.client import connect as connect_websocket

from aioserve import Server, serving
from aioserve._net import loops
from aioserve._net.acceptor import Acceptor
from aioserve._net.loops import choose_acceptor
from aioserve._net.portable import PortableAcceptor
from aioserve.testing.leaks import open_descriptors
from tests.conftest import LOOPS
from tests.helpers.apps import App
from tests.helpers.clients import connect, connect_tls, get
from tests.helpers.loops import (
    WithFixedProtocols,
    WithoutAccepting,
    WithoutReaders,
    WithoutReadersAndTLS,
    WithoutTLS,
)
from tests.helpers.proactor import PortableLoop
from tests.helpers.programs import Program
from tests.helpers.turns import turns
from tests.helpers.ways import WAYS, Way

LACKS = re.escape(
    "aioserve needs an event loop with add_reader() and connect_accepted_socket(), or with create_server(), and with "
    "set_protocol() in its transports; tests.helpers.loops."
)
LACKS_TLS = re.escape("a server with TLS needs an event loop with start_tls(), and tests.helpers.loops.")


def on(*makes: Callable[[], asyncio.AbstractEventLoop]) -> pytest.MarkDecorator:
    """Run a test on these loops, and not on those of the option `--loop`."""
    backends = [("asyncio", {"loop_factory": make}) for make in makes]
    ids = [getattr(make, "__qualname__", "") for make in makes]
    return pytest.mark.parametrize("anyio_backend", backends, ids=ids)


async def never(server: Server) -> None:
    """A body that must not run."""
    raise AssertionError("the body ran")


# Which acceptor.


@on(asyncio.SelectorEventLoop, LOOPS.get("eager", {}).get("loop_factory", asyncio.new_event_loop), uvloop.Loop)
@pytest.mark.parametrize("tls", [False, True])
async def test_loop_that_can_watch_sockets_lets_us_accept(forget_loops: Callable[[], None], tls: bool) -> None:
    assert await choose_acceptor(tls=tls) is Acceptor


@on(PortableLoop, WithoutReaders)
@pytest.mark.parametrize("tls", [False, True])
async def test_loop_that_can_not_accepts_itself(forget_loops: Callable[[], None], tls: bool) -> None:
    assert await choose_acceptor(tls=tls) is PortableAcceptor


async def test_class_of_loops_is_tried_once(forget_loops: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more for TLS, which a server without it does not need."""
    tried: list[bool] = []
    try_readers = loops._try_readers

    async def trying(tls: bool) -> bool:
        tried.append(tls)
        return await try_readers(tls)

    monkeypatch.setattr(loops, "_try_readers", trying)
    for tls in (False, False, True, True, False):
        await choose_acceptor(tls=tls)
    assert tried == [False, True]


@on(asyncio.SelectorEventLoop)
async def test_loop_of_asyncio_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_try_both", None)
    assert await choose_acceptor() is await choose_acceptor(tls=True) is Acceptor


# What is left of the trial.


ALL = [asyncio.SelectorEventLoop, uvloop.Loop, PortableLoop, WithoutReaders, WithoutAccepting]
ALL += [WithoutTLS, WithoutReadersAndTLS, WithFixedProtocols]


@on(*ALL)
@pytest.mark.parametrize("tls", [False, True])
async def test_trial_leaves_no_descriptor(
    forget_loops: Callable[[], None], tls: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does the loop report an error; also where the loop is refused."""
    before = open_descriptors()
    try:
        await choose_acceptor(tls=tls)
    except RuntimeError:
        pass
    assert open_descriptors() == before
    assert caplog.records == []


@on(*ALL)
async def test_trial_that_is_cancelled_leaves_no_descriptor(
    forget_loops: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """At each of its turns."""
    before = open_descriptors()
    for count in range(20):
        trying = asyncio.create_task(choose_acceptor(tls=True))
        await turns(count)
        trying.cancel()
        await asyncio.wait({trying})
        await turns()
        assert open_descriptors() == before, count
        forget_loops()
    assert caplog.records == []


# Loops of a few lines.


@on(WithoutReaders)
async def test_loop_without_readers_serves() -> None:
    """HTTP, and WebSockets."""
    async with serving(App()) as server:
        assert (await get(server)).text == "hello"
        async with connect_websocket(server.ws_url, proxy=None) as client:
            await client.send("hello")
            assert await client.recv() == "hello"


@on(WithoutReaders)
async def test_loop_without_readers_serves_with_tls(tls: tuple[dict[str, Any], ssl.SSLContext]) -> None:
    options, context = tls
    async with serving(App(), **options) as server, connect_tls(server, context) as client:
        client.ask("/")
        assert (await client.answer()).startswith(b"HTTP/1.1 200 ")


@on(WithoutReaders)
async def test_loop_without_readers_answers_what_is_in_flight_at_the_stop() -> None:
    app = App()
    async with serving(app) as server, connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        server.close()
        await turns()
        app.release.set()
        assert (await client.rest()).endswith(b"hello")
    assert server.report is not None
    assert not server.report.was_forced


# Loops that are refused.


@on(WithoutAccepting, WithFixedProtocols)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_loop_that_can_do_neither_is_refused_before_the_app_starts(way: Way, tmp_path: Path) -> None:
    """In one sentence, and nothing is left, also of a Unix socket."""
    app = App()
    kind = type(asyncio.get_running_loop()).__name__
    with pytest.raises(RuntimeError, match=f"^{LACKS}{kind} has not$"):
        await way(app, never, uds=tmp_path / "app.sock")
    assert app.events == []
    assert list(tmp_path.iterdir()) == []


@on(WithoutTLS, WithoutReadersAndTLS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_loop_without_start_tls_is_refused_for_a_server_with_tls(way: Way, tls_options: dict[str, Any]) -> None:
    """In one sentence before the app starts, and not at each handshake."""
    app = App()
    kind = type(asyncio.get_running_loop()).__name__
    with pytest.raises(RuntimeError, match=f"^{LACKS_TLS}{kind} has none$"):
        await way(app, never, **tls_options)
    assert app.events == []


@on(WithoutTLS, WithoutReadersAndTLS)
async def test_loop_without_start_tls_serves_without_tls(tls_options: dict[str, Any]) -> None:
    """Also after it was refused."""
    with pytest.raises(RuntimeError, match=LACKS_TLS):
        async with serving(App(), **tls_options):
            pass
    async with serving(App()) as server:
        assert (await get(server)).text == "hello"


def test_loop_without_start_tls_is_reported_by_the_command_line_in_one_line(tls_options: dict[str, Any]) -> None:
    """The exit code is 3."""
    options = ("--factory", "--port=0", "--ssl-certfile", tls_options["ssl_certfile"])
    loop = "tests.helpers.loops:WithoutTLS"
    with Program("-m", "aioserve", "tests.helpers.apps:factory", *options, "--loop", loop) as program:
        code, err = program.end()
    assert code == 3
    assert re.fullmatch(f"aioserve: cannot start: --loop {loop}: {LACKS_TLS}WithoutTLS has none\n", err)
