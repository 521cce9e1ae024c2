"""
`serving_process()`: the exit contract with the app in a child, and who takes whom along.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import uvicorn

from aioserve import (
    ServerCrashedError,
    ServerProcess,
    ServingError,
    ShutdownError,
    StartupError,
    StartupInterruptedError,
    StartupTimeoutError,
    _process,
    serving_process,
)
from tests.apps import App
from tests.programs import ROOT, Program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched as Linux lets one")

TALKING = "tests.children:talking"


@pytest.fixture(params=["by its descriptor", "by its pipe"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notice the child's end as on Linux, and as elsewhere."""
    if request.param == "by its pipe":
        monkeypatch.delattr(os, "pidfd_open")


@pytest.fixture(autouse=True)
def children_are_gone() -> Iterator[None]:
    """Leave no child, not even a dead one that nobody has waited for."""
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def short_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_process, "EXIT", 0.1)


async def get(server: ServerProcess, path: str = "/") -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False) as client:  # noqa: S501
        return await client.get(path)


@contextlib.asynccontextmanager
async def asking(server: ServerProcess, path: str) -> AsyncIterator[asyncio.StreamReader]:
    assert server.port is not None
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
    try:
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def is_free(port: int | None) -> bool:
    assert port is not None
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


# The usual case.


@pytest.mark.usefixtures("both_ways")
async def test_it_serves_for_the_length_of_a_block(capfd: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, which has ended with the block, and in good order."""
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
    assert server.report[1:] == (0, (), (), False)
    assert is_free(port)
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"starting {server.pid}", "lifespan over"]
    assert err == ""


async def test_what_is_in_flight_is_answered() -> None:
    """Also what waits in the kernel's queue: the child owns its sockets."""
    async with contextlib.AsyncExitStack() as stack:
        async with serving_process(TALKING) as server:
            os.kill(server.pid, signal.SIGSTOP)
            reader = await stack.enter_async_context(asking(server, "/"))
            server.close()
            await asyncio.sleep(0)
            os.kill(server.pid, signal.SIGCONT)
        assert (await reader.read()).endswith(b"hello")


async def test_lent_sockets_are_left_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are never closed, and what waits in their queue is answered by whoever comes next."""

    def note(app: str, told: Mapping[str, Any]) -> Any:
        lents.extend(lent for _fd, lent in told["listeners"])
        return spawn(app, told)

    lents: list[bool] = []
    spawn = _process._spawn
    monkeypatch.setattr(_process, "_spawn", note)
    with socket.socket() as lent:
        lent.bind(("127.0.0.1", 0))
        async with serving_process(TALKING, sockets=[lent]) as first, serving_process(TALKING):
            assert lents == [True, False]
            assert (await get(first)).text == "hello"
        async with asking(first, "/") as reader:
            async with serving_process(TALKING, sockets=[lent]):
                assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")


async def test_a_unix_socket_is_gone_with_the_child(tmp_path: Path) -> None:
    """However that ends."""
    path = tmp_path / "app.sock"
    async with serving_process(TALKING, uds=path) as server:
        assert (server.host, server.port) == (None, None)
        assert server.url.endswith("app.sock")
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as client:
            assert (await client.get("http://test/")).text == "hello"
    assert not path.exists()

    with pytest.raises(ServerCrashedError):
        async with serving_process(TALKING, uds=path) as server:
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.Event().wait()
    assert not path.exists()


async def test_several_at_once() -> None:
    """Each in its own process."""
    async with serving_process(TALKING) as one, serving_process(TALKING) as two:
        assert one.pid != two.pid
        assert (await get(one)).text == (await get(two)).text == "hello"
        os.kill(one.pid, signal.SIGTERM)
        await one.wait_closed()
        assert (await get(two)).text == "hello"


async def test_the_child_imports_as_its_parent_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the parent's path, working directory and warnings; what lies there does not shadow what we import."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "click.py").write_text("raise RuntimeError('this is not the real one')")
    (tmp_path / "lone_app.py").write_text("from tests.children import path as app\n")
    monkeypatch.syspath_prepend(str(ROOT))
    async with serving_process("lone_app:app") as server:
        found = (await get(server)).text
    assert found == repr((sys.path, str(tmp_path), sys.warnoptions, ""))


async def test_its_log_can_be_had(capfd: pytest.CaptureFixture[str]) -> None:
    """On the standard error; and the parent's logging is left alone."""
    async with serving_process(TALKING, log_level="info", use_colors=False) as server:
        await get(server)
    err = capfd.readouterr().err
    assert f"INFO:     Serving on {server.url}\n" in err
    assert '"GET / HTTP/1.1" 200 OK\n' in err


# It cannot start.


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("app", "options", "message", "note"),
    [
        ("nowhere:app", {}, 'cannot load nowhere:app: .*Could not import module "nowhere"', None),
        ("tests.broken_module:app", {}, "cannot load .*AppError: at import", "broken_module.py"),
        ("tests.apps:broken_factory", {"factory": True}, "AppError: the factory's own", "apps.py"),
        ("tests.exiting_module:app", {}, "SystemExit", None),
        ("tests.children:failing", {}, "the app's lifespan failed to start: AppError: the app's own", "apps.py"),
    ],
)
async def test_a_start_that_fails_raises(
    app: str, options: Any, message: str, note: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """What `serving()` raises; and the child's traceback is a note of it, and nowhere else."""
    with pytest.raises(StartupError, match=message) as caught:
        async with serving_process(app, **options):
            raise AssertionError("the body ran")
    notes = getattr(caught.value, "__notes__", [])
    if note is not None:
        assert notes[0].startswith("In the child process:\nTraceback")
        assert note in notes[0]
    assert capfd.readouterr().err == ""


async def test_a_busy_port_is_an_os_error() -> None:
    """There is no child at all then."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}.*in use"):
            async with serving_process(TALKING, port=port):
                raise AssertionError("the body ran")


async def test_a_certificate_that_is_missing_is_an_os_error() -> None:
    """Which says which."""
    with pytest.raises(FileNotFoundError) as caught:
        async with serving_process(TALKING, ssl_certfile="/nowhere"):
            raise AssertionError("the body ran")
    assert caught.value.filename == "/nowhere"


async def test_what_only_the_child_can_find_wrong_is_an_error_all_the_same() -> None:
    """As here, where a configuration is none of logging."""
    with pytest.raises(ValueError, match="dictionary doesn't specify a version"):
        async with serving_process(TALKING, log_config={}):
            raise AssertionError("the body ran")


@pytest.mark.parametrize("app", ["tests.children:hanging", "tests.blocking_module:app"])
async def test_a_start_that_takes_too_long_is_given_up(app: str) -> None:
    """An import counts as well, since it holds up nobody here."""
    with pytest.raises(StartupTimeoutError, match=r"within startup_timeout=1\.5 seconds") as caught:
        async with serving_process(app, startup_timeout=1.5):
            raise AssertionError("the body ran")
    assert isinstance(caught.value.__cause__, TimeoutError)


@pytest.mark.parametrize("app", ["tests.children:hanging", "tests.blocking_module:app"])
async def test_a_child_that_is_killed_while_it_starts(app: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Says so."""

    async def kill() -> None:
        while not children():
            await asyncio.sleep(0.001)
        os.kill(children()[0], signal.SIGKILL)

    killing = asyncio.create_task(kill())
    with pytest.raises(StartupError, match=r"ended \(killed by SIGKILL\) before the app had started"):
        async with serving_process(app):
            raise AssertionError("the body ran")
    await killing


def children() -> list[int]:
    return [int(each) for each in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


async def test_a_start_that_is_cancelled_takes_the_child_along() -> None:
    """And waits for its end."""
    app = "tests.children:hanging"
    with anyio.move_on_after(0.5) as scope:
        async with serving_process(app):
            raise AssertionError("the body ran")
    assert scope.cancelled_caught
    assert children() == []


# The body, and the child's death.


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("SIGKILL", r"the child process \d+ ended \(killed by SIGKILL\) while it was serving"),
        ("/exit", r"the child process \d+ ended \(exit code 7\) while it was serving"),
        ("/crash", "the app's lifespan died while it was serving: AppError: the app's own"),
    ],
)
async def test_a_child_that_dies_cancels_the_body(how: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """And says how; to the task, it never was a cancellation."""
    seen = []
    with pytest.raises(ServerCrashedError, match=said) as caught:
        async with serving_process(TALKING) as server:
            try:
                if how == "SIGKILL":
                    os.kill(server.pid, signal.SIGKILL)
                else:
                    with contextlib.suppress(httpx.HTTPError):
                        await get(server, how)
                await asyncio.Event().wait()
            finally:
                seen.append("unwound")
    assert seen == ["unwound"]
    assert is_free(server.port)
    assert server.returncode == {"SIGKILL": -9, "/exit": 7, "/crash": 1}[how]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    if how == "/crash":
        assert "tests.apps.AppError: the app's own" in caught.value.__notes__[0]


async def test_what_a_dead_child_has_forked_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    """Else it would hold the port."""
    with pytest.raises(ServerCrashedError):
        async with serving_process(TALKING) as server:
            assert (await get(server, "/fork")).text == "hello"
            fork = int(capfd.readouterr().out.split("forked ")[1])
            end = os.pidfd_open(fork)
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.Event().wait()
    await anyio.wait_readable(end)
    os.close(end)
    assert is_free(server.port)


async def test_the_bodys_exception_comes_out() -> None:
    """Itself; also when the child dies of it, which becomes a note."""
    error = ValueError("the body's")
    with pytest.raises(ValueError, match="the body's") as caught:
        async with serving_process(TALKING):
            raise error
    assert caught.value is error

    with pytest.raises(ValueError, match="the body's") as caught:
        async with serving_process(TALKING) as server:
            os.kill(server.pid, signal.SIGKILL)
            try:
                await asyncio.Event().wait()
            finally:
                raise error
    assert "the server failed as well: ServerCrashedError" in error.__notes__[0]


async def test_a_cancelled_body_unwinds_while_the_child_still_answers() -> None:
    """Then it goes on, uncounted."""
    answers: list[str] = []

    async def block() -> None:
        async with serving_process(TALKING) as server:
            try:
                started.set()
                await asyncio.Event().wait()
            finally:
                answers.append((await get(server)).text)

    started = asyncio.Event()
    task = asyncio.create_task(block())
    await started.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert task.cancelling() == 1
    assert answers == ["hello"]


@pytest.mark.parametrize("how", ["a signal", "close()", "limit_max_requests"])
async def test_a_child_that_is_asked_to_stop_is_no_crash(how: str) -> None:
    """The body goes on, and may wait for it; whoever asked."""
    options: Any = {"limit_max_requests": 1} if how == "limit_max_requests" else {}
    async with serving_process(TALKING, **options) as server:
        if how == "a signal":
            os.kill(server.pid, signal.SIGTERM)
        elif how == "close()":
            server.close()
        else:
            await get(server)
        await server.wait_closed()
        assert server.returncode == 0
        assert server.report is not None
        await asyncio.sleep(0)
    assert is_free(server.port)


@pytest.mark.parametrize("when", ["body", "startup"])
async def test_stop_on_signals_is_for_the_parent(when: str) -> None:
    """The block ends normally; before that, the start is given up."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        if when == "body":
            async with serving_process(TALKING, stop_on_signals=[signal.SIGUSR1]) as server:
                signal.raise_signal(signal.SIGUSR1)
                await asyncio.Event().wait()
            assert server.returncode == 0
        else:
            asyncio.get_running_loop().call_later(0.3, signal.raise_signal, signal.SIGUSR1)
            with pytest.raises(StartupInterruptedError, match="SIGUSR1 stopped the server"):
                async with serving_process("tests.children:hanging", stop_on_signals=[signal.SIGUSR1]):
                    raise AssertionError("the body ran")
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


# The stop.


async def test_what_had_to_be_forced_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    """As `Server.report` has it."""
    async with contextlib.AsyncExitStack() as stack:
        async with serving_process("tests.apps:factory", factory=True, shutdown_timeout=0) as server:
            reader = await stack.enter_async_context(asking(server, "/stream"))
            await reader.readuntil(b"data: 0")
    assert server.returncode == 1
    assert server.report is not None
    (handler,) = server.report.cancelled
    assert (handler.method, handler.path, handler.stuck) == ("GET", "/stream", False)
    assert handler.client is not None
    assert handler.client[0] == "127.0.0.1"
    assert any("apps.py" in each for each in handler.where)
    assert "was stopped by force" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["a second cancellation", "close(timeout=0)", "close(timeout=0.1)"])
async def test_a_stop_can_be_forced(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Where its time would never be over."""

    async def block() -> None:
        async with serving_process("tests.apps:factory", factory=True, shutdown_timeout=None) as server:
            servers.append(server)
            reader = await stack.enter_async_context(asking(server, "/stream"))
            await reader.readuntil(b"data: 0")
            if how != "a second cancellation":
                server.close(timeout=float(how[14:-1]))
                await server.wait_closed()
            else:
                streaming.set()
                await asyncio.Event().wait()

    servers: list[ServerProcess] = []
    streaming = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        task = asyncio.create_task(block())
        if how == "a second cancellation":
            await streaming.wait()
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() == (how == "a second cancellation")
        if not task.cancelled():
            task.result()
    assert servers[0].report is not None
    assert [each.path for each in servers[0].report.cancelled] == ["/stream"]


@pytest.mark.usefixtures("short_exit", "both_ways")
async def test_a_child_that_blocks_its_loop_is_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """When its time is over, which is bounded; and that is an error."""
    monkeypatch.setattr(_process, "longest", lambda *timeouts: 0.1)
    with pytest.raises(ShutdownError, match=r"\(killed by SIGKILL\): it did not stop within 0\.2"):
        async with contextlib.AsyncExitStack() as stack, serving_process(TALKING) as server:
            await stack.enter_async_context(asking(server, "/block"))
            while "blocking" not in capfd.readouterr().out:
                await asyncio.sleep(0.001)
    assert is_free(server.port)


@pytest.mark.usefixtures("short_exit")
async def test_a_child_whose_thread_will_not_end_is_killed() -> None:
    """Its server has stopped, and said so; but what it was still doing is lost, and that is told."""
    with pytest.raises(ShutdownError, match=r"\(killed by SIGKILL\): the server had stopped, but its process did not"):
        async with serving_process(TALKING, shutdown_timeout=0.1) as server:
            assert (await get(server, "/thread")).text == "hello"
    assert server.returncode == -signal.SIGKILL
    assert server.report is not None


async def test_a_child_has_the_shutdown_timeout_for_its_hooks() -> None:
    """Such as what exporters and profilers do at the interpreter's exit."""
    async with serving_process("tests.children:late") as server:
        pass
    assert server.returncode == 0


@pytest.mark.usefixtures("short_exit")
async def test_a_child_that_has_left_its_group_is_killed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is still known by its own number."""
    monkeypatch.setattr(_process, "longest", lambda *timeouts: 0.1)
    with pytest.raises(ShutdownError, match="killed by SIGKILL"):
        async with contextlib.AsyncExitStack() as stack, serving_process(TALKING) as server:
            assert (await get(server, "/leave")).text == "hello"
            await stack.enter_async_context(asking(server, "/block"))


@pytest.mark.parametrize("level", ["trace", 10, None])
async def test_a_child_takes_every_log_level(level: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Names, numbers and none."""
    async with serving_process(TALKING, log_level=level) as server:
        assert (await get(server)).text == "hello"


def test_a_parent_without_a_standard_output_can_have_a_child() -> None:
    """As daemons are."""
    with Program("-c", WITHOUT_OUTPUT) as program:
        assert program.end() == (0, "")


WITHOUT_OUTPUT = """
import asyncio, os, sys
os.close(1)
sys.stdout = None
from aioserve import serving_process

async def main():
    async with serving_process("tests.apps:factory", factory=True):
        pass

asyncio.run(main())
"""


async def test_a_lifespan_that_does_not_end_is_a_shutdown_error(capfd: pytest.CaptureFixture[str]) -> None:
    """From the child, in the words of `serving()`."""
    with pytest.raises(ShutdownError, match="did not shut down within"):
        async with serving_process("tests.children:clinging_in_a_hurry", factory=True, shutdown_timeout=0):
            pass


# What cannot be handed to another process.


@pytest.mark.parametrize(
    ("app", "options", "message"),
    [
        (App(), {}, "must be an import string"),
        (uvicorn.Config(TALKING, log_config=None), {}, "must be an import string"),
        ("__main__:app", {}, "whose __main__ is another"),
        (TALKING, {"ssl": ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)}, "ssl=.* it is an object of this one"),
        (TALKING, {"http": asyncio.Protocol}, "http=.* cannot be handed to another process"),
        (TALKING, {"workers": 2}, "no worker processes"),
        (TALKING, {"prot": 2}, "did you mean 'port'"),
        (TALKING, {"log_level": 1.5}, "log_level"),
    ],
)
async def test_what_cannot_be_handed_over_is_refused(app: Any, options: Any, message: str) -> None:
    """Before anything starts."""
    with pytest.raises(TypeError, match=message):
        async with serving_process(app, **options):
            raise AssertionError("the body ran")


# The parent's death, and the terminal.

PARENT = """
import asyncio, os, signal, sys, time
from aioserve import _lifespan, _shutdown, serving_process
from tests.conftest import LOOPS

async def main(app, moment):
    if moment == "blocked":  # so that the child is given up soon
        _shutdown.CANCELLED_HANDLERS = _lifespan.Lifespan.grace = 0.05
    async with serving_process(app, shutdown_timeout=0.5) as server:
        print("ready", server.pid, server.port, flush=True)
        if moment == "stopping":
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(b"GET /stream HTTP/1.1\\r\\nhost: test\\r\\n\\r\\n")
            await reader.readuntil(b"data: 0")
            print("streaming", flush=True)
        elif moment == "blocked":
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(b"GET /block HTTP/1.1\\r\\nhost: test\\r\\n\\r\\n")
            await asyncio.Event().wait()
        else:
            try:
                await asyncio.Event().wait()
            finally:
                print("the body unwinds, and the child has ended with", server.returncode, flush=True)

app, moment, loop = sys.argv[1:]
with asyncio.Runner(**LOOPS[loop]) as runner:
    runner.run(main(app, moment))
"""


def parent(app: str, moment: str, loop: str) -> Program:
    return Program("-c", PARENT, app, moment, loop)


def child_of(program: Program) -> int:
    return int(Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children").read_text())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("app", "moment", "said"),
    [
        ("tests.blocking_module:app", "importing", "importing"),
        ("tests.children:hanging", "starting", "starting"),
        (TALKING, "serving", "ready"),
        (TALKING, "stopping", "streaming"),
        (TALKING, "blocked", "blocking"),
    ],
    ids=lambda value: value if value.isalpha() else "",
)
def test_a_parent_that_is_killed_takes_the_child_along(app: str, moment: str, said: str, loop: str) -> None:
    """Wherever it is; and the port is free."""
    with parent(app, moment, loop) as program:
        program.wait_for(said)
        end = os.pidfd_open(child_of(program))
        port = port_of(program)
        program.send(signal.SIGKILL)
        program.process.wait()
        assert select.select([end], [], [], 30)[0]
        os.close(end)
    assert port is None or is_free(port)


def port_of(program: Program) -> int | None:
    ready = [line for line in program.said if line.startswith("ready")]
    return int(ready[0].split()[2]) if ready else None


def test_a_parent_that_is_killed_right_away_takes_the_child_along() -> None:
    """Before the child has come to say anything."""
    with parent(TALKING, "serving", "asyncio") as program:
        children = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children")
        while not children.read_text():
            pass
        end = os.pidfd_open(child_of(program))
        program.send(signal.SIGKILL)
        program.process.wait()
        assert select.select([end], [], [], 30)[0]
        os.close(end)


def test_a_fork_of_the_parent_that_outlives_it_does_not_keep_the_child() -> None:
    """Though it has the other end of the lifeline."""
    forking = PARENT.replace('print("ready"', 'os.fork() or signal.pause(); print("ready"')
    allowed = ("-W", "ignore:.*use of fork:DeprecationWarning")
    with Program(*allowed, "-c", forking, TALKING, "serving", "asyncio") as program:
        child = int(program.wait_for("ready").split()[1])
        end = os.pidfd_open(child)
        program.send(signal.SIGKILL)
        program.process.wait()
        assert select.select([end], [], [], 30)[0]
        os.close(end)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_ctrl_c_reaches_the_child_by_its_parent_only(loop: str) -> None:
    """The terminal sends it to all of the group; the body unwinds while the child still serves."""
    with parent(TALKING, "serving", loop) as program:
        program.wait_for("ready")
        os.killpg(program.process.pid, signal.SIGINT)
        code, err = program.end()
    assert code == -signal.SIGINT
    assert err.endswith("KeyboardInterrupt\n")
    assert program.said[-2:] == ["the body unwinds, and the child has ended with None", "lifespan over"]


def test_an_error_of_a_kind_that_we_do_not_know_is_a_serving_error() -> None:
    """Should the child be of another version."""
    told = {"type": "NewError", "message": "something new", "errno": None, "filename": None, "traceback": ""}
    error = _process._error_of(told)
    assert type(error) is ServingError
    assert str(error) == "something new"
