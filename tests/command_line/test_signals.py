"""
The command line and signals: an app that takes them over, and the terminal that closes.
"""

from __future__ import annotations

import signal
import socket
import sys

import httpx
import pytest

from tests.helpers.programs import Program

LOOPS = ["asyncio", "uvloop"]


def command(app: str, loop: str, **options: object) -> Program:
    arguments = ("-m", "aioserve", f"tests.helpers.{app}", "--factory", "--port=0", "--loop", loop)
    return Program(*arguments, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("app", ["by_the_loop", "by_a_function", "exiting", "removing"])
def test_signal_that_the_app_has_taken_over_stops_the_server_and_calls_the_apps_handler(
    app: str, signum: signal.Signals, loop: str
) -> None:
    """The app's handler comes first; that of the other signal is not called. A handler that exits does not prevent the
    stop.
    """
    with command(f"taking:{app}", loop) as program:
        url = program.wait_for("http://")
        program.send(signum)
        code, err = program.end()
    called = ["the app's handler: SIGTERM"] if signum == signal.SIGTERM else []
    removed = ["removed: True"] if app == "removing" else []
    assert (code, program.said) == (0, ["starting", url, *called, *removed, "lifespan over"])
    assert f"{signum.name}: stopping {url}" in err
    assert "Traceback" not in err
    assert "WARNING" not in err


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("app", ["by_default", "in_c"])
def test_signal_whose_handler_was_replaced_by_none_stops_the_server(app: str, loop: str) -> None:
    """By the default action, or by C code, whose handlers Python does not know."""
    with command(f"taking:{app}", loop) as program:
        program.wait_for("http://")
        program.send(signal.SIGTERM)
        assert program.end()[0] == 0
    assert program.said[-1] == "lifespan over"


@pytest.mark.parametrize("loop", LOOPS)
def test_handler_of_the_app_that_raises_is_logged_and_the_server_stops(loop: str) -> None:
    """The exception would otherwise come out of any line of Python."""
    with command("taking:raising", loop) as program:
        program.wait_for("http://")
        program.send(signal.SIGTERM)
        code, err = program.end()
    assert code == 0
    assert "the app's handler for SIGTERM raised an exception" in err
    assert "AppError: the app's own" in err
    assert program.said[-1] == "lifespan over"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("app", ["early_by_the_loop", "early_by_a_function"])
def test_signal_that_an_import_has_taken_over_ends_a_startup_that_hangs(app: str, loop: str) -> None:
    """It is taken back when the app was imported, and not only when it has started."""
    with command(f"taking:{app}", loop) as program:
        program.wait_for("starting")
        program.send(signal.SIGTERM)
        code, err = program.end()
    assert (code, program.said) == (0, ["starting", "the app's handler: SIGTERM", "lifespan over"])
    assert err.endswith("aioserve: SIGTERM stopped the server before it had started\n")


@pytest.mark.parametrize("loop", LOOPS)
def test_callback_that_the_app_gives_to_the_loop_during_its_startup_is_called_at_once(loop: str) -> None:
    """Nobody has to look again: the loop is that of the command line."""
    with command("taking:hanging_by_the_loop", loop) as program:
        program.wait_for("starting")
        program.send(signal.SIGTERM)
        code, _ = program.end()
    assert (code, program.said) == (0, ["starting", "the app's handler: SIGTERM", "lifespan over"])


# SIGHUP.


@pytest.mark.parametrize("loop", LOOPS)
def test_sighup_stops_the_command(loop: str) -> None:
    """It comes when the terminal closes."""
    with command("taking:plain", loop) as program:
        url = program.wait_for("http://")
        program.send(signal.SIGHUP)
        code, err = program.end()
    assert (code, program.said[-1]) == (0, "lifespan over")
    assert f"SIGHUP: stopping {url}" in err


@pytest.mark.parametrize("loop", LOOPS)
def test_sighup_that_is_ignored_does_not_stop_the_command(loop: str) -> None:
    """As nohup does it."""
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    with command("apps:factory", loop, preexec=ignore) as program:
        url = program.wait_for("http://")
        program.send(signal.SIGHUP)
        assert httpx.get(url, trust_env=False).text == "hello"
        program.send(signal.SIGTERM)
        code, err = program.end()
    assert code == 0
    assert "SIGHUP" not in err


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("app", ["reloading", "reloading_by_the_loop"])
def test_sighup_that_the_app_handles_does_not_stop_the_command(app: str, loop: str) -> None:
    """With SIGHUP, programs reload their configuration."""
    with command(f"taking:{app}", loop) as program:
        url = program.wait_for("http://")
        program.send(signal.SIGHUP)
        program.wait_for("the app's handler: SIGHUP")
        assert httpx.get(url, trust_env=False).text == "hello"
        program.send(signal.SIGTERM)
        code, err = program.end()
    assert code == 0
    assert "SIGHUP" not in err


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.skipif(sys.platform != "linux", reason="it has to know when the program is asleep")
def test_sighup_never_forces_the_stop(loop: str) -> None:
    """A terminal that closes sends it twice: by its shell, and by the kernel. systemd sends it along with SIGTERM."""
    with command("taking:plain", loop) as program:
        port = int(program.wait_for("http://").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /hold HTTP/1.1\r\nhost: test\r\n\r\n")
            program.wait_for("asked")
            for signum in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
                program.wait_until_asleep()
                program.send(signum)
            program.wait_until_asleep()
            program.send(signal.SIGUSR1)
            with client.makefile("rb") as answer:
                assert answer.read().endswith(b"hello")  # it says "connection: close"
            code, err = program.end()
    assert (code, program.said[-2:]) == (0, ["answered", "lifespan over"])
    assert "forced" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="it has to know when the program is asleep")
def test_sighup_does_not_cut_the_exit_short() -> None:
    """Other signals do, when the server has stopped and only threads are left to wait for."""
    with Program("-m", "aioserve", "tests.helpers.children:talking", "--port=0") as program:
        url = program.wait_for("http://")
        assert httpx.get(f"{url}/thread", trust_env=False).text == "hello"
        program.send(signal.SIGHUP)
        program.wait_for("lifespan over")
        for signum in (signal.SIGHUP, signal.SIGTERM):
            program.wait_until_asleep()
            program.send(signum)
        code, err = program.end()
    assert code == 1
    assert "aioserve: SIGTERM: exiting without waiting for threads: Thread-" in err
    assert "SIGHUP: exiting" not in err
