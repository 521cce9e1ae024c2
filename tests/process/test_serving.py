"""
`serving_process()`: the app is served by a child process for the length of a block.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from aioserve import (
    ServerCrashedError,
    serving_process,
)
from aioserve._process import parent as _process
from aioserve._process.messages import Handover
from aioserve._process.spawn import spawn
from tests.helpers.processes import TALKING, asking, get, is_free, linux_only
from tests.helpers.programs import ROOT, Program

pytestmark = linux_only


@pytest.mark.usefixtures("both_ways")
async def test_child_process_serves_for_the_length_of_the_block(capfd: pytest.CaptureFixture[str]) -> None:
    """It has ended with the block, and in an orderly way."""
    async with serving_process(TALKING) as server:
        assert server.urls == [server.url] == [f"http://{server.host}:{server.port}"]
        assert server.pid != os.getpid()
        assert server.returncode is None
        assert server.report is None
        assert (await get(server)).text == "hello"
        link = f'<a href="{server.url}" target="_blank">{server.url}</a>'
        assert server._repr_html_() == f"aioserve.ServerProcess {link} <em>running</em>"
        port = server.port
    assert server._repr_html_() == f"aioserve.ServerProcess {server.url} <em>closed</em>"
    assert server.returncode == 0
    assert server.report is not None
    assert not server.report.was_forced
    assert is_free(port)
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"starting {server.pid}", "lifespan over"]
    assert err == ""


async def test_server_in_a_child_process_is_copied_as_itself_and_not_pickled() -> None:
    """As a server of this process; a copy could not watch the child."""
    async with serving_process(TALKING) as server:
        assert copy.copy(server) is copy.deepcopy({"server": server})["server"] is server
        with pytest.raises(TypeError, match=r"^an aioserve\.ServerProcess cannot be pickled; pass its url instead$"):
            pickle.dumps(server)


async def test_child_answers_requests_in_its_queue_when_it_stops() -> None:
    """The child owns its sockets, and so the queue of the kernel, too."""
    async with contextlib.AsyncExitStack() as stack:
        async with serving_process(TALKING) as server:
            os.kill(server.pid, signal.SIGSTOP)
            reader = await stack.enter_async_context(asking(server, "/"))
            server.close()
            await asyncio.sleep(0)
            os.kill(server.pid, signal.SIGCONT)
        assert (await reader.read()).endswith(b"hello")


async def test_child_leaves_lent_sockets_to_the_next_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are never closed, and connections in their queue are answered by the next server."""

    def note(app: str, handover: Handover) -> Any:
        lents.extend(lent for _fd, lent, *_ in handover.listeners)
        return spawn(app, handover)

    lents: list[bool] = []
    monkeypatch.setattr(_process, "spawn", note)
    with socket.socket() as lent:
        lent.bind(("127.0.0.1", 0))
        async with serving_process(TALKING, sockets=[lent]) as first, serving_process(TALKING):
            assert lents == [True, False]
            assert (await get(first)).text == "hello"
        async with asking(first, "/") as reader:
            async with serving_process(TALKING, sockets=[lent]):
                assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")


async def test_unix_socket_is_removed_when_the_child_ends(tmp_path: Path) -> None:
    """Also when the child is killed."""
    path = tmp_path / "app.sock"
    async with serving_process(TALKING, uds=path) as server:
        assert not hasattr(server, "host")
        assert not hasattr(server, "port")
        assert server.url.endswith("app.sock")
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as client:
            assert (await client.get("http://test/")).text == "hello"
    assert not path.exists()

    with pytest.raises(ServerCrashedError):
        async with serving_process(TALKING, uds=path) as server:
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.Event().wait()
    assert not path.exists()


@pytest.mark.parametrize("killed", [False, True])
async def test_child_serves_several_kinds_of_listeners(killed: bool, tmp_path: Path) -> None:
    """None of ours is left when it has ended, also if it was killed; what was lent stays open."""
    path = tmp_path / "app.sock"
    with socket.socket() as lent, contextlib.ExitStack() as expected:
        lent.bind(("127.0.0.1", 0))
        if killed:
            expected.enter_context(pytest.raises(ServerCrashedError))
        async with serving_process(TALKING, port=0, uds=path, sockets=[lent], uds_mode=0o640) as server:
            assert (await get(server)).text == "hello"
            assert server.urls == [
                f"http://127.0.0.1:{server.port}",
                f"http+unix://{str(path).replace('/', '%2F')}",
                f"http://127.0.0.1:{lent.getsockname()[1]}",
            ]
            assert path.stat().st_mode & 0o777 == 0o640
            async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as client:
                assert (await client.get("http://test/")).text == "hello"
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(server.urls[2])).text == "hello"
            port = server.port
            if killed:
                os.kill(server.pid, signal.SIGKILL)
                await asyncio.Event().wait()
        assert lent.fileno() >= 0
    assert is_free(port)
    assert not path.exists()


async def test_child_whose_second_listener_cannot_be_bound_is_not_started(tmp_path: Path) -> None:
    """The first one is free again, and the error is raised here."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        async with serving_process(TALKING, port=port, uds=tmp_path / "nowhere" / "app.sock"):
            raise AssertionError("the body ran")
    assert is_free(port)


async def test_several_child_processes_serve_at_once() -> None:
    """Each is a process of its own."""
    async with serving_process(TALKING) as one, serving_process(TALKING) as two:
        assert one.pid != two.pid
        assert (await get(one)).text == (await get(two)).text == "hello"
        os.kill(one.pid, signal.SIGTERM)
        await one.wait_closed()
        assert (await get(two)).text == "hello"


async def test_child_imports_from_the_same_places_as_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It has the parent's path, working directory and warning filters; a module there does not shadow what aioserve
    imports.
    """
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "click.py").write_text("raise RuntimeError('this is not the real one')")
    (tmp_path / "lone_app.py").write_text("from tests.helpers.children import path as app\n")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "warnoptions", [*sys.warnoptions, "ignore:none of ours"])  # as -W would
    async with serving_process("lone_app:app") as server:
        found = (await get(server)).text
    assert found == repr((sys.path, str(tmp_path), sys.warnoptions, ""))


async def test_child_logs_to_the_standard_error_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    """The parent's logging is not changed."""
    async with serving_process(TALKING, log_level="info", use_colors=False) as server:
        await get(server)
    err = capfd.readouterr().err
    assert f"INFO:     Uvicorn running on {server.url}\n" in err
    assert '"GET / HTTP/1.1" 200 OK\n' in err


@pytest.mark.parametrize("level", ["trace", 10, None])
async def test_child_accepts_every_form_of_log_level(level: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Names, numbers and None."""
    async with serving_process(TALKING, log_level=level) as server:
        assert (await get(server)).text == "hello"


@linux_only
async def test_child_takes_the_options_for_slow_and_vanished_clients() -> None:
    """They are the child's; without the second one, the stop would wait for the handler."""
    options: Any = {"header_timeout": 0.2, "cancel_on_disconnect": True, "shutdown_timeout": None}
    async with serving_process("tests.helpers.apps:factory", factory=True, **options) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(b"GET / HT")
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        await writer.wait_closed()
        _, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(b"GET /hold HTTP/1.1\r\nhost: test\r\n\r\n")
        assert (await get(server)).text == "hello"  # so the other one has begun
        writer.close()
        await writer.wait_closed()


def test_parent_without_a_standard_output_can_start_a_child() -> None:
    """Daemons have none."""
    with Program("-c", WITHOUT_OUTPUT) as program:
        assert program.end() == (0, "")


WITHOUT_OUTPUT = """
import asyncio, os, sys
os.close(1)
sys.stdout = None
from aioserve import serving_process

async def main():
    async with serving_process("tests.helpers.apps:factory", factory=True):
        pass

asyncio.run(main())
"""
