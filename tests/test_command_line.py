"""
The command line, as people and programs use it: what it prints, and with what it exits.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from aioserve import _options
from aioserve.__main__ import OURS, PASSED
from tests.programs import ROOT, Program

COMMAND = ("-m", "aioserve")


def command(*arguments: str, **options: Any) -> Program:
    return Program(*COMMAND, *arguments, **options)


def refused(*arguments: str) -> tuple[int, str]:
    """Run it where it must end by itself; return the exit code and the one thing that it says."""
    with command(*arguments) as program:
        code, err = program.end()
    assert program.said == []
    return code, err


def accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


# What it says, and how it ends.


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_it_serves_until_a_signal_comes(name: str, loop: str) -> None:
    """It prints its URL and nothing else, logs to the standard error, and exits with 0."""
    with command("tests.apps:factory", "--factory", "--port", "0", "--loop", loop) as program:
        url = program.wait_for("http://127.0.0.1:")
        assert httpx.get(url, trust_env=False).text == "hello"
        program.send(signal.Signals[name])
        code, err = program.end()
    assert code == 0
    assert program.said == [url]
    assert re.sub(r":\d{4,}", ":8000", err).splitlines() == [
        "INFO:     Serving on http://127.0.0.1:8000",
        'INFO:     127.0.0.1:8000 - "GET / HTTP/1.1" 200 OK',
        f"INFO:     {name}: stopping http://127.0.0.1:8000",
        "INFO:     Closed http://127.0.0.1:8000",
    ]


def test_it_is_installed_as_a_command() -> None:
    """`aioserve` does what `python -m aioserve` does."""
    script = Path(sys.executable).with_name("aioserve")
    done = subprocess.run([str(script), "--version"], capture_output=True, text=True, check=True)  # noqa: S603
    assert re.fullmatch(r"aioserve \S+ with uvicorn \S+ on CPython \S+\n", done.stdout)


def test_several_hosts_are_several_lines() -> None:
    """On one port."""
    with command("tests.apps:without_lifespan", "--host=127.0.0.1", "--host=127.0.0.2", "--port=0") as program:
        urls = [program.wait_for("http://127.0.0.1:"), program.wait_for("http://127.0.0.2:")]
        assert len({url.rpartition(":")[2] for url in urls}) == 1
        program.send(signal.SIGTERM)
        assert program.end()[0] == 0


def test_it_serves_on_a_unix_socket(tmp_path: Path) -> None:
    """With the mode that is asked for; and takes it away at the end."""
    path = tmp_path / "app.sock"
    with command("tests.apps:factory", "--factory", "--uds", str(path), "--uds-mode=640") as program:
        assert program.wait_for("http+unix://").endswith("app.sock")
        assert path.stat().st_mode & 0o777 == 0o640
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://test/").text == "hello"
        program.send(signal.SIGTERM)
        assert program.end()[0] == 0
    assert not path.exists()


def test_it_serves_on_a_descriptor() -> None:
    """Which is left as it was."""
    with socket.create_server(("127.0.0.1", 0)) as lent:
        fd = lent.fileno()
        with command("tests.apps:factory", "--factory", f"--fd={fd}", pass_fds=(fd,)) as program:
            url = program.wait_for("http")
            assert url == f"http://127.0.0.1:{lent.getsockname()[1]}"
            assert httpx.get(url, trust_env=False).text == "hello"
            program.send(signal.SIGTERM)
            assert program.end()[0] == 0


@pytest.mark.parametrize("option", ["--systemd", "--systemd-name=web"])
def test_it_serves_on_what_systemd_hands_down(option: str) -> None:
    """All of it, or what goes by a name."""
    with socket.create_server(("127.0.0.1", 0)) as lent:
        as_systemd = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='web'); "
            "os.execv(sys.executable, [sys.executable, '-u', *sys.argv[2:]])"
        )
        fd = lent.fileno()
        arguments = (*COMMAND, "tests.apps:factory", "--factory", option)
        with Program("-c", as_systemd, str(fd), *arguments, pass_fds=(fd,)) as program:
            assert program.wait_for("http") == f"http://127.0.0.1:{lent.getsockname()[1]}"
            program.send(signal.SIGTERM)
            assert program.end()[0] == 0


def test_a_program_is_told_where_it_serves() -> None:
    """By one line of JSON."""
    told, tell = os.pipe()
    with (
        open(told) as reader,
        command("tests.apps:factory", "--factory", "--port=0", f"--ready-fd={tell}", pass_fds=(tell,)) as program,
    ):
        os.close(tell)
        (line,) = reader.readlines()
        ready = json.loads(line)
        url = program.wait_for("http")
        port = int(url.rpartition(":")[2])
        assert ready == {
            "event": "ready",
            "url": url,
            "urls": [url],
            "host": "127.0.0.1",
            "port": port,
            "pid": program.process.pid,
        }
        program.send(signal.SIGTERM)
        assert program.end()[0] == 0


def test_a_program_is_told_why_it_does_not_serve() -> None:
    """In the same way."""
    told, tell = os.pipe()
    with (
        open(told) as reader,
        command("tests.broken_module:app", "--port=0", f"--ready-fd={tell}", pass_fds=(tell,)) as program,
    ):
        os.close(tell)
        failed = json.loads(reader.read())
        assert program.end()[0] == 3
    assert failed["event"] == "failed"
    assert failed["error"]["type"] == "StartupError"
    assert failed["error"]["message"] == "cannot load tests.broken_module:app: AppError: at import"


def test_the_first_signal_waits_for_a_request_and_the_second_does_not() -> None:
    """That was by force, so the exit code is 1, and a warning says what blocked."""
    with command("tests.apps:factory", "--factory", "--port=0", "--shutdown-timeout=none") as program:
        port = int(program.wait_for("http").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /stream HTTP/1.1\r\nhost: test\r\n\r\n")
            client.recv(65536)
            program.send(signal.SIGTERM)
            while accepts(port):
                pass
            program.send(signal.SIGINT)
            code, err = program.end()
    assert code == 1
    assert "was stopped by force; handlers told to end: 0, cancelled: 1" in err


def test_a_stop_that_had_to_be_forced_exits_with_1() -> None:
    """Here because the time was over."""
    with command("tests.apps:factory", "--factory", "--port=0", "--shutdown-timeout=0") as program:
        port = int(program.wait_for("http").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /stream HTTP/1.1\r\nhost: test\r\n\r\n")
            client.recv(65536)
            program.send(signal.SIGTERM)
            assert program.end()[0] == 1


def test_a_lifespan_that_dies_exits_with_1() -> None:
    """With the app's traceback, and one line."""
    with command("tests.children:dying", "--port=0") as program:
        program.wait_for("http")
        code, err = program.end()
    assert code == 1
    assert err.count("Traceback") == 1
    assert "apps.py" in err
    assert "aioserve/_" not in err
    assert err.endswith("aioserve: the app's lifespan died while it was serving: AppError: the app's own\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("app", "waiting"),
    [("tests.blocking_module:app", "importing"), ("tests.children:hanging", "starting")],
    ids=["in an import", "in the lifespan"],
)
def test_a_signal_gives_the_startup_up(app: str, waiting: str, name: str) -> None:
    """At once, without a traceback, and with 0: nothing was lost."""
    with command(app, "--port=0") as program:
        program.wait_for(waiting)
        program.send(signal.Signals[name])
        code, err = program.end()
    assert code == 0
    assert "Traceback" not in err
    assert err.endswith(f"aioserve: {name} stopped the server before it had started\n")


# Where it cannot start.


def test_a_busy_port_is_told_before_the_app_is_imported() -> None:
    """In one line, with 3."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        code, err = refused("tests.blocking_module:app", f"--port={port}")
    assert code == 3
    assert re.fullmatch(rf"aioserve: it cannot start: .*127\.0\.0\.1:{port}: Address already in use.*\n", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:app"], 'cannot load nowhere:app: ImportFromStringError: Could not import module "nowhere".'),
        (["tests.apps:nothing"], 'Attribute "nothing" not found in module "tests.apps".'),
        (["tests.apps:not_callable"], "cannot load tests.apps:not_callable: it is no ASGI app, but 42"),
        (["tests.apps:factory", "--factory", "--ssl-certfile=/nowhere"], "No such file or directory: /nowhere"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(arguments: list[str], message: str) -> None:
    """With 3."""
    code, err = refused(*arguments, "--port=0")
    assert code == 3
    assert re.fullmatch(rf"aioserve: it cannot start: .*{message}.*\n", err)


@pytest.mark.parametrize(
    ("arguments", "file", "message"),
    [
        (["tests.broken_module:app"], "broken_module.py", "cannot load tests.broken_module:app: AppError: at import"),
        (["tests.apps:broken_factory", "--factory"], "apps.py", "AppError: the factory's own"),
        (["tests.children:failing"], "apps.py", "the app's lifespan failed to start: AppError: the app's own"),
    ],
)
def test_what_the_app_raised_is_told_with_its_traceback(arguments: list[str], file: str, message: str) -> None:
    """Which has the app's frames and none of ours; then one line, and 3."""
    code, err = refused(*arguments, "--port=0")
    *log, last = err.splitlines()
    assert code == 3
    assert log[0] == "ERROR:    Traceback (most recent call last):"
    assert file in log[1]
    assert "aioserve/_" not in err
    assert err.count("Traceback") == 1
    assert last.startswith("aioserve: it cannot start: ")
    assert last.endswith(message)


# What makes no sense.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'APP'."),
        (["app"], "an import string must look like \"package.module:attribute\", and 'app' does not"),
        (["a:b", "--prot=1"], "No such option.*--prot.*--port.*"),
        (["a:b", "--workers=2"], "there is no option --workers: there are no worker processes: .*"),
        (["a:b", "--reload"], "there is no option --reload: reloading restarts the process.*"),
        (["a:b", "--port=x"], "Invalid value for '--port': 'x' is not a valid integer."),
        (["a:b", "--port=70000"], "port must be from 0 to 65535, and 70000 is not.*"),
        (["a:b", "--shutdown-timeout=long"], ".*'long' is neither a number of seconds nor none"),
        (["a:b", "--shutdown-timeout=-1"], "shutdown_timeout must be 0 or more seconds, not -1.0.*"),
        (["a:b", "--drain-delay=none"], "drain_delay must be a limited number of seconds, not None.*"),
        (["a:b", "--ready-fd=99"], ".*99 is no open file descriptor"),
        (["a:b", f"--log-config={__file__}"], ".+"),
        (["a:b", "--http=h3"], "http must be one of .*, not 'h3'"),
    ],
)
def test_a_command_line_that_makes_no_sense_exits_with_2(arguments: list[str], message: str) -> None:
    """As everywhere, and with one line."""
    code, err = refused(*arguments)
    assert code == 2
    assert re.fullmatch(f"aioserve: {message}\n", err)


# Its options.


def test_every_option_of_serving_is_there_or_has_no_form_there() -> None:
    """And the help shows each once."""
    names = {each.name for each in (*OURS, *PASSED)}
    without_form = {"sockets", "ssl", "ssl_context_factory", "stop_on_signals"}
    there = _options._config_parameters() | set(_options._OURS)  # an older uvicorn lacks some
    assert (_options.Options.__optional_keys__ & there) - names == without_form & there
    with command("--help") as program:
        assert program.end() == (0, "")
    shown = re.findall(r"^  (--[\w-]+)", "\n".join(program.said), flags=re.MULTILINE)
    assert len(shown) == len(set(shown))
    hidden = {"--for-parent"}
    assert {*shown} | hidden == {each.opts[0] for each in (*OURS, *PASSED) if each.param_type_name == "option"} | {
        "--help"
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"port": 8000}),
        (["--shutdown-timeout=none", "--disconnect-after=1.5"], {"shutdown_timeout": None, "disconnect_after": 1.5}),
        (["--header=x-a: 1", "--header", "x-b:2"], {"headers": [("x-a", " 1"), ("x-b", "2")]}),
        (["--no-access-log", "--log-level=warning"], {"access_log": False, "log_level": "warning"}),
        (["--limit-max-requests=5", "--ws=none"], {"limit_max_requests": 5, "ws": "none"}),
        (["--host=::1", "--port=1"], {"host": ("::1",), "port": 1}),
    ],
)
def test_options_arrive_as_serving_takes_them(
    arguments: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those that were given; the others are left to their defaults."""
    from aioserve import __main__

    def parse(app: str, options: dict[str, Any]) -> str:
        given.update(options)
        return app

    given: dict[str, Any] = {}
    monkeypatch.setattr(__main__, "parse", parse)
    monkeypatch.setattr(__main__, "run", lambda *arguments, **options: 0)
    monkeypatch.setattr(sys, "path", list(sys.path))
    __main__.command.main(["a:b", *arguments], standalone_mode=False)
    assert given.pop("stop_on_signals") is True
    assert given.pop("log_config")["loggers"]["aioserve"]["handlers"] == ["default"]
    assert given == {"port": 8000, **expected}


def test_the_app_is_looked_for_where_it_is_said(tmp_path: Path) -> None:
    """In the current directory, or in another."""
    (tmp_path / "lone_app.py").write_text("from tests.apps import without_lifespan as app\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    script = str(Path(sys.executable).with_name("aioserve"))
    for arguments, cwd in (([], tmp_path), (["--app-dir", str(tmp_path)], ROOT)):
        with subprocess.Popen(  # noqa: S603
            [script, "lone_app:app", "--port=0", *arguments],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("http://127.0.0.1:")
            process.terminate()
        assert process.returncode == 0


def test_it_serves_with_the_loop_that_is_asked_for() -> None:
    """By default uvloop's, where that is installed."""
    from aioserve._program import _loop_factory

    modules = {}
    for name in ("auto", "asyncio", "uvloop"):
        factory = _loop_factory(name)
        assert factory is not None
        loop = factory()
        modules[name] = type(loop).__module__.partition(".")[0]
        loop.close()
    assert modules == {"auto": "uvloop", "asyncio": "asyncio", "uvloop": "uvloop"}


# Signals that come late, and descriptors that are not what they should be.


LEAVING = """
import atexit, os, sys

def leave():
    os.write(1, b"leaving\\n")
    sys.stdin.read()

atexit.register(leave)
sys.argv = ["aioserve", "tests.apps:factory", "--factory", "--port", "0"]
from aioserve.__main__ import main
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_on_the_way_out_changes_nothing(name: str) -> None:
    """The server has stopped in good order, and so the exit code says."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as stdin, Program("-c", LEAVING, stdin=reading) as program:
        os.close(reading)
        program.wait_for("http://")
        program.send(signal.SIGTERM)
        program.wait_for("leaving")
        program.send(signal.Signals[name])
        stdin.close()
        code, err = program.end()
    assert code == 0, err
    assert "Traceback" not in err


def test_a_signal_does_not_wait_for_threads_on_the_way_out() -> None:
    """Those that the interpreter would wait for, of synchronous endpoints above all."""
    with command("tests.children:talking", "--port", "0") as program:
        url = program.wait_for("http://")
        assert httpx.get(f"{url}/thread", trust_env=False).text == "hello"
        program.send(signal.SIGTERM)
        program.wait_for("lifespan over")
        program.wait_until_asleep()
        program.send(signal.SIGTERM)
        code, err = program.end()
    assert code == 1
    assert "aioserve: SIGTERM: not waiting for what still runs: Thread-" in err


def test_without_a_standard_output_it_serves_all_the_same() -> None:
    """Programs have a descriptor of their own to be told by."""
    reading, writing = os.pipe()
    with (
        os.fdopen(reading) as ready,
        command(
            "tests.apps:factory",
            "--factory",
            "--port=0",
            f"--ready-fd={writing}",
            pass_fds=(writing,),
            preexec=lambda: os.close(1),
        ) as program,
    ):
        os.close(writing)
        url = json.loads(ready.readline())["url"]
        assert httpx.get(url, trust_env=False).text == "hello"
        program.send(signal.SIGTERM)
        assert program.end()[0] == 0


def test_a_descriptor_that_cannot_be_written_to_is_refused() -> None:
    """Before anything starts."""
    reading, writing = os.pipe()
    try:
        with command("tests.apps:factory", f"--ready-fd={reading}", pass_fds=(reading,)) as program:
            code, err = program.end()
    finally:
        os.close(reading)
        os.close(writing)
    assert (code, err) == (
        2,
        f"aioserve: Invalid value for '--ready-fd': descriptor {reading} is open for reading only\n",
    )


def test_a_header_without_a_colon_is_refused() -> None:
    """It has a name and a value."""
    assert refused("tests.apps:factory", "--header", "foo") == (2, "aioserve: --header 'foo' is no name:value\n")


def test_a_host_that_is_unknown_is_told_in_one_line() -> None:
    """It is nobody's code that is at fault."""
    code, err = refused("tests.apps:factory", "--factory", "--host", "no-such-host.invalid")
    assert code == 3
    assert re.fullmatch(r"aioserve: it cannot start: .*no-such-host\.invalid.*\n", err)
