"""
Whole programs on a stand-in for Windows: `tests/helpers/windows.py` hides what Windows has not, before aioserve is
imported, and gives them asyncio's loop for Windows.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import WARNINGS_ARE_ERRORS
from tests.helpers.programs import ROOT, Program

BEGINNING = """
import tests.helpers.windows
import asyncio, signal, sys
import aioserve
from tests.helpers.apps import without_lifespan as app
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with warnings as errors, and without the options of this run of pytest."""
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, *WARNINGS_ARE_ERRORS, "-c", BEGINNING + textwrap.dedent(program), *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)  # noqa: S603


def printed(program: str) -> list[str]:
    """Run a program; return the lines that it has printed, if it has ended well and has not complained."""
    done = run(program)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_import_of_all_public_names_needs_nothing_of_unix() -> None:
    """Not even `serving_process`, which is refused when it is called."""
    program = """
        for name in aioserve.__all__:
            getattr(aioserve, name)
        import aioserve.demo, aioserve.pytest_plugin, aioserve.testing, aioserve._process.command
        print([name for name in tests.helpers.windows.HIDDEN_MODULES if sys.modules[name] is not None])
    """
    assert printed(program) == ["[]"]


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_each_way_to_start_serves_requests_and_websockets(tls: bool, tmp_path: Path) -> None:
    """And stops gracefully, with nothing left."""
    program = f"""
        import ssl
        import anyio, httpx, trustme
        from websockets.asyncio.client import connect
        from aioserve.testing import assert_nothing_left
        from tests.helpers.apps import App

        options, context = {{}}, None
        if {tls}:
            authority = trustme.CA()
            authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path({str(tmp_path / "cert")!r})
            options = {{"ssl_certfile": {str(tmp_path / "cert")!r}}}
            context = ssl.create_default_context()
            authority.configure_trust(context)

        async def use(server):
            async with httpx.AsyncClient(trust_env=False, verify=context or True) as client:
                answer = await client.get(server.url)
            async with connect(server.ws_url, ssl=context, proxy=None) as websocket:
                await websocket.send("a message")
                print(type(asyncio.get_running_loop()).__name__, answer.text, await websocket.recv())

        async def main():
            async with assert_nothing_left():
                async with aioserve.serving(App(), **options) as server:
                    await use(server)
                server = await aioserve.start(App(), **options)
                await use(server)
                await server.aclose()
                async with anyio.create_task_group() as group:
                    server = await group.start(lambda **status: aioserve.serve(App(), **status, **options))
                    await use(server)
                    server.close()

        asyncio.run(main())
    """
    assert printed(program) == ["PortableLoop hello a message"] * 3


def test_server_in_a_thread_and_its_end_with_the_program() -> None:
    """The second one is stopped by nobody."""
    program = """
        import urllib.request
        def get(server):
            with urllib.request.urlopen(server.url) as answer:
                print(answer.read().decode())
        with aioserve.start_in_thread(app) as server:
            get(server)
        get(aioserve.start_in_thread(app))
    """
    assert printed(program) == ["hello", "hello"]


def test_swappable_replaces_its_app() -> None:
    """In a running server."""
    program = """
        import httpx

        async def main():
            swappable = aioserve.Swappable(app)
            async with aioserve.serving(swappable) as server, httpx.AsyncClient(trust_env=False) as client:
                print((await client.get(server.url)).text)
                await swappable.swap(app)
                print((await client.get(server.url)).text)

        asyncio.run(main())
    """
    assert printed(program) == ["hello", "hello"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGBREAK"])
def test_stop_signals_are_ctrl_c_and_ctrl_break(name: str) -> None:
    """The block is cancelled, and ends normally."""
    program = f"""
        async def main():
            async with aioserve.serving(app, stop_on_signals=True) as server:
                signal.raise_signal(signal.{name})
                await asyncio.sleep(10)
            print(server.report.was_forced)

        asyncio.run(main())
    """
    assert printed(program) == ["False"]


@pytest.mark.parametrize("option", ["uds='app.sock'", "uds_mode=0o600", "fd=0", "systemd=True", "reuse_port=True"])
def test_options_that_windows_has_not_are_refused_by_name(option: str) -> None:
    program = f"""
        async def main():
            async with aioserve.serving(app, {option}):
                pass

        try:
            asyncio.run(main())
        except ValueError as exc:
            print(exc)
    """
    assert printed(program) == [f"{option.partition('=')[0]} is not supported on Windows"]


def test_child_process_is_refused() -> None:
    program = """
        async def main():
            async with aioserve.serving_process("tests.helpers.apps:without_lifespan"):
                pass

        try:
            asyncio.run(main())
        except RuntimeError as exc:
            print(exc)
    """
    assert printed(program) == [
        (
            "serving_process() cannot start a child process: that is not supported on Windows; "
            "serve the app in this process"
        )
    ]


def test_plugin_runs_tests_against_real_servers(tmp_path: Path) -> None:
    """And the check that nothing is left finds a task."""
    (tmp_path / "test_app.py").write_text(
        textwrap.dedent("""
            import asyncio
            import pytest
            from aioserve.testing import assert_nothing_left
            from tests.helpers.apps import without_lifespan as app

            pytestmark = pytest.mark.anyio

            @pytest.fixture
            def anyio_backend():
                return "asyncio"

            async def test_request(aioserve_client):
                client = await aioserve_client(app)
                assert (await client.get("/")).text == "hello"

            async def test_leak():
                with pytest.raises(AssertionError, match="a task"):
                    async with assert_nothing_left():
                        task = asyncio.create_task(asyncio.sleep(10))
                task.cancel()

            def test_without_a_loop(aioserve_live_server):
                import urllib.request
                with urllib.request.urlopen(aioserve_live_server(app).url) as answer:
                    assert answer.read() == b"hello"
        """)
    )
    options = ["-qs", "-p", "no:asyncio", "-p", "no:cacheprovider", str(tmp_path)]
    done = run(f"import pytest; sys.exit(pytest.main({options}))")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "3 passed" in done.stdout


def test_command_line_serves_until_ctrl_c() -> None:
    """With its URL on standard output."""
    program = "import aioserve._process.command as command; command.main()"
    arguments = ("tests.helpers.apps:factory", "--factory", "--port", "0")
    with Program("-c", BEGINNING + program, *arguments, warnings_are_errors=True) as running:
        running.wait_for("http://127.0.0.1:")
        running.send(signal.SIGINT)
        code, err = running.end()
    assert code == 0, err
    assert "Uvicorn running on http://127.0.0.1:" in err


def test_command_line_refuses_what_windows_has_not() -> None:
    done = run(
        "import aioserve._process.command as command; command.main()", "tests.helpers.apps:without_lifespan", "--uds=a"
    )
    assert (done.returncode, done.stderr) == (
        2,
        "aioserve: uds is not supported on Windows (aioserve --help lists the options)\n",
    )


def test_demo_makes_every_kind_of_request_and_ends() -> None:
    done = run("import aioserve.demo; aioserve.demo.command_line()", "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("stopped in ")


def test_command_line_expands_no_pattern_and_refuses_descriptors() -> None:
    """click would expand `*` on Windows, also where it is quoted."""
    program = "import os; os.name = 'nt'; import aioserve._process.command as command; command.main()"
    done = run(program, "nowhere:app", "*.md")
    assert "unexpected extra argument (*.md)" in done.stderr
    for option in ("--fd", "--ready-fd"):
        done = run("import aioserve._process.command as command; command.main()", "nowhere:app", option, "1")
        assert done.returncode == 2
        assert "descriptors are not supported on Windows" in done.stderr


def test_waits_for_a_server_in_a_thread_have_their_limit() -> None:
    """They look now and then, since Ctrl+C interrupts no wait for a lock there before Python 3.14."""
    program = """
        with aioserve.start_in_thread(app) as server:
            print(server.wait_closed(0), server.wait_closed(0.25))
            server.close()
            print(server.wait_closed())
    """
    assert printed(program) == ["False False", "True"]


def test_unread_request_on_a_kept_alive_connection_is_answered_on_the_selector_loop() -> None:
    """It is looked for without taking it."""
    program = """
        import socket
        from tests.helpers.apps import App

        async def main():
            server = await aioserve.start(App())
            with socket.create_connection((server.host, server.port)) as client:
                reader, writer = await asyncio.open_connection(sock=client)
                writer.write(b"GET / HTTP/1.1\\r\\nhost: test\\r\\n\\r\\n")
                await reader.readuntil(b"hello")
                client.send(b"GET / HTTP/1.1\\r\\nhost: test\\r\\n\\r\\n")
                await server.aclose()
                print((await reader.read()).endswith(b"hello"))
                writer.close()

        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(main())
    """
    assert printed(program) == ["True"]
