"""
The command line: what it prints, and its exit codes.
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
from aioserve._process.command import OWN_OPTIONS, PASSED_OPTIONS
from aioserve._settings import Settings
from aioserve._settings import parse as parse_settings
from tests.helpers.http2 import needs_http2
from tests.helpers.programs import ROOT, Program

COMMAND = ("-m", "aioserve")


def command(*arguments: str, **options: Any) -> Program:
    return Program(*COMMAND, *arguments, **options)


def refused(*arguments: str) -> tuple[int, str]:
    """Run a command that ends by itself; return its exit code and its standard error."""
    with command(*arguments) as program:
        code, err = program.end()
    assert program.said == []
    return code, err


def accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


# Output and exit codes.


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_command_serves_until_a_signal(name: str, loop: str) -> None:
    """
    The URL goes to the standard output and nothing else does; the log goes to the standard error; the exit code is 0.
    """
    with command("tests.helpers.apps:factory", "--factory", "--port", "0", "--loop", loop) as program:
        url = program.wait_for("http://127.0.0.1:")
        assert httpx.get(url, trust_env=False).text == "hello"
        program.send(signal.Signals[name])
        code, err = program.end()
    assert code == 0
    assert program.said == [url]
    assert re.sub(r":\d{4,}", ":8000", err).splitlines() == [
        "INFO:     Uvicorn running on http://127.0.0.1:8000 (Press CTRL+C to quit)",
        'INFO:     127.0.0.1:8000 - "GET / HTTP/1.1" 200 OK',
        f"INFO:     {name}: stopping http://127.0.0.1:8000",
        "INFO:     Closed http://127.0.0.1:8000",
    ]


@needs_http2
def test_options_for_slow_and_vanished_clients_and_http2_reach_the_server() -> None:
    """Given as options of the command."""
    arguments = ["--http2", "--header-timeout", "0.2", "--cancel-on-disconnect", "--shutdown-timeout", "none"]
    with command("tests.helpers.apps:factory", "--factory", "--port", "0", *arguments) as program:
        url = program.wait_for("http://127.0.0.1:")
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with httpx.Client(http1=False, http2=True, trust_env=False) as client:
            assert client.get(url).http_version == "HTTP/2"
        with socket.create_connection(address, timeout=10) as slow:
            slow.sendall(b"GET / HT")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(address, timeout=10) as vanishing:
            vanishing.sendall(b"GET /hold HTTP/1.1\r\nhost: test\r\n\r\n")
            assert httpx.get(url, trust_env=False).text == "hello"  # so the other one has begun
        program.send(signal.SIGTERM)
        assert program.end()[0] == 0  # there is nobody to wait for


def test_aioserve_is_installed_as_a_command() -> None:
    """`aioserve` does what `python -m aioserve` does."""
    script = Path(sys.executable).with_name("aioserve")
    done = subprocess.run([str(script), "--version"], capture_output=True, text=True, check=True)  # noqa: S603
    assert re.fullmatch(r"aioserve \S+ with uvicorn \S+ on CPython \S+\n", done.stdout)


def test_each_host_prints_a_line_with_its_url() -> None:
    """All of them have the same port."""
    with command("tests.helpers.apps:without_lifespan", "--host=127.0.0.1", "--host=127.0.0.2", "--port=0") as program:
        urls = [program.wait_for("http://127.0.0.1:"), program.wait_for("http://127.0.0.2:")]
        assert len({url.rpartition(":")[2] for url in urls}) == 1
        program.send(signal.SIGTERM)
        assert program.end()[0] == 0


def test_command_serves_on_a_unix_socket(tmp_path: Path) -> None:
    """The socket has the mode that `--uds-mode` says, and is removed at the end."""
    path = tmp_path / "app.sock"
    with command("tests.helpers.apps:factory", "--factory", "--uds", str(path), "--uds-mode=640") as program:
        assert program.wait_for("http+unix://").endswith("app.sock")
        assert path.stat().st_mode & 0o777 == 0o640
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://test/").text == "hello"
        program.send(signal.SIGTERM)
        code, err = program.end()
    assert code == 0
    assert f"INFO:     Uvicorn running on unix socket {path} (Press CTRL+C to quit)\n" in err
    assert not path.exists()


def test_command_serves_on_several_kinds_of_listeners(tmp_path: Path) -> None:
    """It prints and logs all URLs, and the descriptor that waits for them gets them."""
    path = tmp_path / "app.sock"
    reading, writing = os.pipe()
    with open(reading) as reader, socket.create_server(("127.0.0.1", 0)) as lent:
        fds = (lent.fileno(), writing)
        options = ("--port=0", f"--uds={path}", f"--fd={fds[0]}", f"--ready-fd={writing}")
        with command("tests.helpers.apps:factory", "--factory", *options, pass_fds=fds) as program:
            os.close(writing)
            ready = json.loads(reader.readline())
            program.wait_for(lent_url := f"http://127.0.0.1:{lent.getsockname()[1]}")
            url = f"http://127.0.0.1:{ready['port']}"
            assert program.said == ready["urls"] == [url, f"http+unix://{str(path).replace('/', '%2F')}", lent_url]
            assert ready["url"] == url
            assert httpx.get(url, trust_env=False).text == httpx.get(lent_url, trust_env=False).text == "hello"
            program.send(signal.SIGTERM)
            code, err = program.end()
    assert code == 0
    for where in (url, f"unix socket {path}", lent_url):
        assert f"INFO:     Uvicorn running on {where} (Press CTRL+C to quit)\n" in err
    assert f"INFO:     Closed {', '.join(ready['urls'])}\n" in err
    assert not path.exists()


def test_command_with_a_listener_that_fails_leaves_no_other(tmp_path: Path) -> None:
    """One line says which."""
    path = tmp_path / "app.sock"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = refused("tests.helpers.apps:factory", "--factory", f"--port={port}", f"--uds={path}")
    assert code == 3
    assert err.startswith(f"aioserve: cannot start: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert list(tmp_path.iterdir()) == []


def test_command_serves_on_a_descriptor() -> None:
    """The descriptor stays open."""
    with socket.create_server(("127.0.0.1", 0)) as lent:
        fd = lent.fileno()
        with command("tests.helpers.apps:factory", "--factory", f"--fd={fd}", pass_fds=(fd,)) as program:
            url = program.wait_for("http")
            assert url == f"http://127.0.0.1:{lent.getsockname()[1]}"
            assert httpx.get(url, trust_env=False).text == "hello"
            program.send(signal.SIGTERM)
            assert program.end()[0] == 0


@pytest.mark.parametrize("option", ["--systemd", "--systemd-name=web"])
def test_command_serves_on_the_sockets_that_systemd_passes(option: str) -> None:
    """`--systemd` takes all of them, `--systemd-name` those of one name."""
    with socket.create_server(("127.0.0.1", 0)) as lent:
        as_systemd = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='web'); "
            "os.execv(sys.executable, [sys.executable, '-u', *sys.argv[2:]])"
        )
        fd = lent.fileno()
        arguments = (*COMMAND, "tests.helpers.apps:factory", "--factory", option)
        with Program("-c", as_systemd, str(fd), *arguments, pass_fds=(fd,)) as program:
            assert program.wait_for("http") == f"http://127.0.0.1:{lent.getsockname()[1]}"
            program.send(signal.SIGTERM)
            assert program.end()[0] == 0


def test_ready_fd_gets_the_url_when_the_server_has_started() -> None:
    """It is one line of JSON."""
    reading, writing = os.pipe()
    with (
        open(reading) as reader,
        command(
            "tests.helpers.apps:factory", "--factory", "--port=0", f"--ready-fd={writing}", pass_fds=(writing,)
        ) as program,
    ):
        os.close(writing)
        line = reader.readline()
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


def test_ready_fd_gets_the_error_when_the_start_fails() -> None:
    """It is one line of JSON."""
    reading, writing = os.pipe()
    with (
        open(reading) as reader,
        command("tests.helpers.broken_module:app", "--port=0", f"--ready-fd={writing}", pass_fds=(writing,)) as program,
    ):
        os.close(writing)
        failed = json.loads(reader.read())
        assert program.end()[0] == 3
    assert failed["event"] == "failed"
    assert failed["error"]["type"] == "StartupError"
    assert failed["error"]["message"] == "cannot load tests.helpers.broken_module:app: AppError: at import"


def test_descriptor_that_cannot_be_served_is_an_error_of_the_start() -> None:
    """It is told like any other, also to `--ready-fd`."""
    reading, writing = os.pipe()
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams, open(reading) as reader:
        fds = (datagrams.fileno(), writing)
        options = (f"--fd={fds[0]}", f"--ready-fd={writing}")
        with command("tests.helpers.apps:factory", "--factory", *options, pass_fds=fds) as program:
            os.close(writing)
            failed = json.loads(reader.read())
            code, err = program.end()
    assert code == 3
    assert failed["error"]["type"] == "ValueError"
    assert err == f"aioserve: cannot start: {failed['error']['message']}\n"
    assert "only TCP sockets and Unix stream sockets can be served" in err


def test_second_signal_forces_the_stop() -> None:
    """
    The first one waits for the request in flight. After a forced stop the exit code is 1, and a warning names the
    request.
    """
    with command("tests.helpers.apps:factory", "--factory", "--port=0", "--shutdown-timeout=none") as program:
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
    assert ": forced shutdown: 0 handlers disconnected, 1 cancelled" in err


def test_forced_stop_exits_with_1() -> None:
    """The stop is forced because its budget is over."""
    with command("tests.helpers.apps:factory", "--factory", "--port=0", "--shutdown-timeout=0") as program:
        port = int(program.wait_for("http").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /stream HTTP/1.1\r\nhost: test\r\n\r\n")
            client.recv(65536)
            program.send(signal.SIGTERM)
            assert program.end()[0] == 1


def test_crash_of_the_lifespan_exits_with_1() -> None:
    """The standard error has the app's traceback and one line."""
    with command("tests.helpers.children:dying", "--port=0") as program:
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
    [("tests.helpers.blocking_module:app", "importing"), ("tests.helpers.children:hanging", "starting")],
    ids=["in an import", "in the lifespan"],
)
def test_signal_during_the_startup_exits_with_0(app: str, waiting: str, name: str) -> None:
    """The startup ends at once and without a traceback; no request was lost."""
    with command(app, "--port=0") as program:
        program.wait_for(waiting)
        program.send(signal.Signals[name])
        code, err = program.end()
    assert code == 0
    assert "Traceback" not in err
    assert err.endswith(f"aioserve: {name} stopped the server before it had started\n")


# The start fails.


def test_busy_port_is_reported_before_the_app_is_imported() -> None:
    """It is one line, and the exit code is 3."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        code, err = refused("tests.helpers.blocking_module:app", f"--port={port}")
    assert code == 3
    assert re.fullmatch(rf"aioserve: cannot start: .*127\.0\.0\.1:{port}: Address already in use.*\n", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere:app"],
            f"cannot load nowhere:app: there is no module nowhere in {ROOT}; give another directory to --app-dir",
        ),
        (["nowhere:app", "--app-dir=/tmp"], "there is no module nowhere in /tmp; give another directory to --app-dir"),
        (["nowhere:app", "--app-dir=/no/dir"], "there is no directory /no/dir; give another one to --app-dir"),
        (["tests.nowhere:app"], f"cannot load tests.nowhere:app: there is no module tests.nowhere in {ROOT}/tests"),
        (["tests.helpers.apps:nothing"], 'Attribute "nothing" not found in module "tests.helpers.apps".'),
        (["tests.helpers.apps:not_callable"], "cannot load tests.helpers.apps:not_callable: not an ASGI app: 42"),
        (["tests.helpers.apps:factory", "--factory", "--ssl-certfile=/nowhere"], "No such file or directory: /nowhere"),
    ],
)
def test_missing_app_or_file_is_reported_in_one_line(arguments: list[str], message: str) -> None:
    """The exit code is 3."""
    code, err = refused(*arguments, "--port=0")
    assert code == 3
    assert re.fullmatch(rf"aioserve: cannot start: .*{message}.*\n", err)


@pytest.mark.parametrize(
    ("arguments", "file", "message"),
    [
        (
            ["tests.helpers.broken_module:app"],
            "broken_module.py",
            "cannot load tests.helpers.broken_module:app: AppError: at import",
        ),
        (["tests.helpers.apps:broken_factory", "--factory"], "apps.py", "AppError: the factory's own"),
        (["tests.helpers.children:failing"], "apps.py", "the app's lifespan failed to start: AppError: the app's own"),
    ],
)
def test_exception_of_the_app_is_reported_with_its_traceback(arguments: list[str], file: str, message: str) -> None:
    """The traceback has the app's frames and none of aioserve's; one line follows; the exit code is 3."""
    code, err = refused(*arguments, "--port=0")
    *log, last = err.splitlines()
    assert code == 3
    assert log[0] == "ERROR:    Traceback (most recent call last):"
    assert file in log[1]
    assert "aioserve/_" not in err
    assert err.count("Traceback") == 1
    assert last.startswith("aioserve: cannot start: ")
    assert last.endswith(message)


@pytest.mark.parametrize(
    ("app", "message"),
    [
        ("failing_at_length", 'Traceback (most recent call last):\n  File "app.py", line 1\nNameError: no name'),
        ("raising_at_length", "AppError: 2 validation errors\nname\n  Field required"),
    ],
)
def test_message_of_several_lines_is_printed_in_lines(app: str, message: str) -> None:
    """Frameworks send a whole traceback, and pydantic a line for each field."""
    code, err = refused(f"tests.helpers.children:{app}", "--port=0")
    assert code == 3
    assert err.endswith(f"aioserve: cannot start: the app's lifespan failed to start: {message}\n")


# Invalid arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'APP'."),
        (["app"], "an import string must look like \"package.module:attribute\", and 'app' does not"),
        (["a:b", "--prot=1"], "No such option.*--prot.*--port.*"),
        (
            ["a:b", "--workers=2"],
            "there is no option --workers: aioserve has no worker processes; use uvicorn --workers",
        ),
        (
            ["a:b", "--reload"],
            "there is no option --reload: aioserve does not restart processes; use uvicorn --reload, or watchfiles",
        ),
        (
            ["a:b", "--timeout-graceful-shutdown=5"],
            "there is no option --timeout-graceful-shutdown; aioserve calls the same option --shutdown-timeout",
        ),
        (["a:b", "--bind=x"], "there is no option --bind; use --host and --port, or --uds"),
        (["a:b", "--timeout=5"], "there is no option --timeout; use --startup-timeout or --shutdown-timeout"),
        (["a:b", "--install-signal-handlers"], "No such option.*"),
        (["a:b", "--port=x"], "Invalid value for '--port': 'x' is not a valid integer."),
        (["a:b", "--port=70000"], "port must be from 0 to 65535, not 70000.*"),
        (["a:b", "--shutdown-timeout=long"], ".*'long' is not a number of seconds or none"),
        (["a:b", "--shutdown-timeout=-1"], "shutdown_timeout must be 0 or more seconds, not -1.0.*"),
        (["a:b", "--drain-delay=none"], "drain_delay must be a limited number of seconds, not None.*"),
        (["a:b", "--ready-fd=99"], ".*99 is not an open file descriptor"),
        (["a:b", f"--log-config={__file__}"], ".+"),
        (["a:b", "--http=h3"], "http must be one of .*, not 'h3'"),
    ],
)
def test_invalid_arguments_exit_with_2(arguments: list[str], message: str) -> None:
    """One line says what is wrong."""
    code, err = refused(*arguments)
    assert code == 2
    assert re.fullmatch(rf"aioserve: {message} \(aioserve --help lists the options\)\n", err)


# Options.


def test_every_option_of_serving_has_a_command_line_option() -> None:
    """Except those that no string can express. The help lists each option once, and `-h` shows the same."""
    names = {each.name for each in (*OWN_OPTIONS, *PASSED_OPTIONS)}
    without_form = {"sockets", "ssl", "ssl_context_factory", "stop_on_signals"}
    there = _options.config_parameters() | set(_options.OWN_OPTIONS)  # an older uvicorn lacks some
    assert (_options.Options.__optional_keys__ & there) - names == without_form & there
    with command("--help") as program:
        assert program.end() == (0, "")
    with command("-h") as short:
        assert short.end() == (0, "")
    assert short.said == program.said
    shown = re.findall(r"^  (?:-h, )?(--[\w-]+)", "\n".join(program.said), flags=re.MULTILINE)
    assert len(shown) == len(set(shown))
    hidden = {"--for-parent"}
    assert {*shown} | hidden == {
        each.opts[0] for each in (*OWN_OPTIONS, *PASSED_OPTIONS) if each.param_type_name == "option"
    } | {"--help", "--version"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"port": 8000}),
        (["--shutdown-timeout=none", "--disconnect-after=1.5"], {"shutdown_timeout": None, "disconnect_after": 1.5}),
        (["--header=x-a: 1", "--header", "x-b:2"], {"headers": [("x-a", " 1"), ("x-b", "2")]}),
        (["--no-access-log", "--log-level=warning"], {"access_log": False, "log_level": "warning"}),
        (["--limit-max-requests=5", "--ws=none"], {"limit_max_requests": 5, "ws": "none"}),
        (["--host=::1", "--port=1"], {"host": ("::1",), "port": 1}),
        (["--uds=x", "--host=::1"], {"uds": "x", "host": ("::1",)}),
        (["--systemd", "--reuse-port"], {"systemd": True, "reuse_port": True}),
        (["--uds=x", "--systemd"], {"uds": "x", "systemd": True, "port": None}),
    ],
)
def test_options_of_the_command_line_are_passed_to_serving(
    arguments: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those that were given; the others keep their defaults."""
    from aioserve._process import command as __main__

    def parse(app: str, options: dict[str, Any]) -> Settings:
        given.update(options)
        return settings

    given: dict[str, Any] = {}
    settings = parse_settings("a:b", {})
    monkeypatch.setattr(__main__, "parse", parse)
    monkeypatch.setattr(__main__, "run", lambda *arguments, **options: 0)
    monkeypatch.setattr(sys, "path", list(sys.path))
    __main__.command.main(["a:b", *arguments], standalone_mode=False)
    assert given.pop("stop_on_signals") is True
    assert given.pop("log_config")["loggers"]["aioserve"]["handlers"] == ["default"]
    assert {"port": None, **given} == {"port": 8000, **expected}


def test_app_is_imported_from_the_current_directory_or_app_dir(tmp_path: Path) -> None:
    """The current directory is the default."""
    (tmp_path / "lone_app.py").write_text("from tests.helpers.apps import without_lifespan as app\n")
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


def test_loop_option_selects_the_event_loop() -> None:
    """The default is uvloop's where uvloop is installed."""
    from aioserve._process.program import _loop_factory

    modules = {}
    for name in ("auto", "asyncio", "uvloop"):
        factory = _loop_factory(name)
        assert factory is not None
        loop = factory()
        modules[name] = type(loop).__module__.partition(".")[0]
        loop.close()
    assert modules == {"auto": "uvloop", "asyncio": "asyncio", "uvloop": "uvloop"}


# Late signals, unusual descriptors, and invalid values.


LEAVING = """
import atexit, os, sys

def leave():
    os.write(1, b"leaving\\n")
    sys.stdin.read()

atexit.register(leave)
sys.argv = ["aioserve", "tests.helpers.apps:factory", "--factory", "--port", "0"]
from aioserve._process.command import main
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_during_the_interpreters_exit_keeps_the_exit_code(name: str) -> None:
    """The server has already stopped in an orderly way, and the exit code says so."""
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


def test_signal_during_the_interpreters_exit_does_not_wait_for_threads() -> None:
    """The interpreter would wait for them, for example for those of synchronous endpoints."""
    with command("tests.helpers.children:talking", "--port", "0") as program:
        url = program.wait_for("http://")
        assert httpx.get(f"{url}/thread", trust_env=False).text == "hello"
        program.send(signal.SIGTERM)
        program.wait_for("lifespan over")
        program.wait_until_asleep()
        program.send(signal.SIGTERM)
        code, err = program.end()
    assert code == 1
    assert "aioserve: SIGTERM: exiting without waiting for threads: Thread-" in err


def test_command_serves_without_a_standard_output() -> None:
    """The program that starts it reads the URL from a descriptor of its own."""
    reading, writing = os.pipe()
    with (
        os.fdopen(reading) as ready,
        command(
            "tests.helpers.apps:factory",
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


def test_ready_fd_that_cannot_be_written_to_is_refused() -> None:
    """Before anything starts."""
    reading, writing = os.pipe()
    try:
        with command("tests.helpers.apps:factory", f"--ready-fd={reading}", pass_fds=(reading,)) as program:
            code, err = program.end()
    finally:
        os.close(reading)
        os.close(writing)
    assert (code, err) == (
        2,
        (
            f"aioserve: Invalid value for '--ready-fd': descriptor {reading} is not writable "
            "(aioserve --help lists the options)\n"
        ),
    )


def test_header_without_a_colon_is_refused() -> None:
    """A header has a name and a value."""
    assert refused("tests.helpers.apps:factory", "--header", "foo") == (
        2,
        "aioserve: --header must look like name:value, not 'foo' (aioserve --help lists the options)\n",
    )


def test_unknown_host_is_reported_in_one_line() -> None:
    """Without a traceback: no code is at fault."""
    code, err = refused("tests.helpers.apps:factory", "--factory", "--host", "no-such-host.invalid")
    assert code == 3
    assert re.fullmatch(r"aioserve: cannot start: .*no-such-host\.invalid.*\n", err)


# The loop.


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ("zuvloop", "--loop zuvloop: there is no module zuvloop; pip install zuvloop"),
        ("nowhere:make", "--loop nowhere:make: there is no module nowhere"),
        ("asyncio:nothing", "--loop asyncio:nothing: AttributeError: module 'asyncio' has no attribute 'nothing'"),
        (
            "quick",
            "--loop quick: choose auto, asyncio, uvloop, zuvloop, rloop, winloop, or a factory like module:factory",
        ),
        (
            "tests.helpers.loops:without_accepting",
            (
                "--loop tests.helpers.loops:without_accepting: aioserve needs an event loop with add_reader() and "
                "connect_accepted_socket(), or with create_server(), and with set_protocol() in its transports; "
                "tests.helpers.loops.WithoutAccepting has not"
            ),
        ),
    ],
)
def test_loop_that_cannot_be_used_is_reported_in_one_line(loop: str, message: str) -> None:
    """The exit code is 3."""
    code, err = refused("tests.helpers.apps:factory", "--factory", "--port=0", "--loop", loop)
    assert (code, err) == (3, f"aioserve: cannot start: {message}\n")


def test_uvloop_that_is_not_installed_is_reported_in_one_line() -> None:
    """By its name, and with what to do."""
    program = "import sys; sys.modules['uvloop'] = None; from aioserve._process.command import main; main()"
    with Program("-c", program, "tests.helpers.apps:factory", "--factory", "--port=0", "--loop=uvloop") as without:
        code, err = without.end()
    assert code == 3
    assert err == "aioserve: cannot start: --loop uvloop: there is no module uvloop; pip install uvloop\n"


def test_loop_that_cannot_be_used_is_told_to_the_ready_fd() -> None:
    """As any other reason."""
    reading, writing = os.pipe()
    with (
        open(reading) as reader,
        command("a:b", "--loop=nowhere:make", f"--ready-fd={writing}", pass_fds=(writing,)) as program,
    ):
        os.close(writing)
        failed = json.loads(reader.read())
        assert program.end()[0] == 3
    assert failed["error"]["message"] == "--loop nowhere:make: there is no module nowhere"


def test_loop_can_be_given_by_its_factory() -> None:
    """As uvicorn takes it."""
    with command(
        "tests.helpers.apps:factory", "--factory", "--port=0", "--loop=tests.helpers.loops:make", "--log-level=warning"
    ) as program:
        assert program.wait_for("made ") == "made a loop"
        url = program.wait_for("http")
        assert httpx.get(url, trust_env=False).text == "hello"
        program.send(signal.SIGTERM)
        assert program.end() == (0, "")


# The URL is said once.


@pytest.mark.parametrize(
    ("level", "expected"),
    [("info", "INFO:     Uvicorn running on {} (Press CTRL+C to quit)"), ("warning", "{}")],
    ids=["in the log", "printed, without the log"],
)
def test_url_is_said_once_where_output_and_errors_go_to_one_place(level: str, expected: str) -> None:
    """As in a terminal, or in systemd's journal."""
    program = subprocess.Popen(  # noqa: S603
        [sys.executable, "-u", *COMMAND, "tests.helpers.apps:factory", "--factory", "--port=0", "--log-level", level],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        text=True,
    )
    with program:
        assert program.stdout is not None
        first = program.stdout.readline()
        program.send_signal(signal.SIGTERM)
        rest = program.stdout.read()
    url = re.search(r"http://127\.0\.0\.1:\d+", first)
    assert url is not None
    assert first == expected.format(url[0]) + "\n"
    assert "running" not in rest
    assert url[0] + "\n" not in rest.splitlines(keepends=True)
    assert program.returncode == 0


@pytest.mark.parametrize(
    ("app", "message"),
    [
        (
            "tests.helpers.mistakes:wsgi",
            "tests.helpers.mistakes:wsgi is a WSGI app: {}".format(
                "pass a2wsgi.WSGIMiddleware(app), or interface='wsgi'"
            ),
        ),
    ],
)
def test_app_that_is_none_is_reported_in_one_line(app: str, message: str) -> None:
    """The exit code is 3."""
    code, err = refused(app, "--port=0")
    assert (code, err) == (3, f"aioserve: cannot start: cannot load {app}: {message}\n")
