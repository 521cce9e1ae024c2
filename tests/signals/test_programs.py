"""
Whole programs that receive signals: when a server stops, and how the program ends.
"""

from __future__ import annotations

import signal
import sys

import pytest

from tests.helpers.forking import ALLOWED
from tests.helpers.programs import Program
from tests.helpers.ways import WAYS

SERVING = "uvicorn.error: Uvicorn running on http://127.0.0.1:8000"


CLOSED = "uvicorn.error: Closed http://127.0.0.1:8000"


END = "the program goes on to its end"


LOOPS = ["asyncio", "uvloop"]


BOTH = ["SIGINT", "SIGTERM"]


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("way", WAYS)
def test_stop_signal_ends_the_block_and_the_program_goes_on(way: str, name: str, loop_name: str) -> None:
    """The body unwinds while its server still answers, the lifespan ends, and the exit code is 0."""
    with Program("-m", "tests.helpers.signalled", way, "body", loop_name, *BOTH) as program:
        program.wait_for("uvicorn.error: Uvicorn running on" if way == "serve" else "the body runs")
        program.send(signal.Signals[name])
        assert program.end() == (0, "")
    body = ["GET /", "answered /", "the body says: hello", "the body is over"] if way == "serving" else []
    (noticed,) = [line for line in program.masked if line.startswith("aioserve: ")]
    assert noticed.startswith(f"aioserve: {name}: ")
    assert [line for line in program.masked if line not in (noticed, "the body runs")] == [
        "startup",
        SERVING,
        *body,
        "shutdown",
        "lifespan over",
        CLOSED,
        END,
    ]


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("way", WAYS)
def test_stop_signal_during_the_startup_gives_the_start_up(way: str, name: str, loop_name: str) -> None:
    """At once and in an orderly way; `serve()` returns, the other ways raise an error that names the signal."""
    with Program("-m", "tests.helpers.signalled", way, "startup", loop_name, *BOTH) as program:
        program.wait_for("startup")
        program.send(signal.Signals[name])
        assert program.end() == (0, "")
    said = [] if way == "serve" else [f"StartupInterruptedError: {name} stopped the server before it had started"]
    assert [line for line in program.masked if not line.startswith("aioserve: ")] == [
        "startup",
        "lifespan over",
        *said,
        END,
    ]


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("way", WAYS)
def test_stop_signal_interrupts_the_import_of_the_app(way: str, loop_name: str) -> None:
    """The import blocks the loop, so nothing in the loop could end it."""
    with Program("-m", "tests.helpers.signalled", way, "import", loop_name, *BOTH) as program:
        program.wait_for("importing")
        program.send(signal.SIGTERM)
        assert program.end() == (0, "")
    said = [] if way == "serve" else ["StartupInterruptedError: SIGTERM stopped the server before it had started"]
    assert program.said == ["importing", *said, END]


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("way", WAYS)
def test_first_stop_signal_does_not_force_a_stop_that_has_begun(way: str, loop_name: str) -> None:
    """The stop had another cause; the request in flight is answered."""
    with Program("-m", "tests.helpers.signalled", way, "stop", loop_name, *BOTH) as program:
        program.wait_for("holding")
        program.send(signal.SIGTERM)
        program.wait_for("aioserve: SIGTERM")
        program.send(signal.SIGUSR1)
        assert program.end() == (0, "")
    assert "answered /hold" in program.said
    assert program.said[-1] == END


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("moment", ["stop", "second"])
@pytest.mark.parametrize("way", WAYS)
def test_second_stop_signal_forces_the_stop(way: str, moment: str, loop_name: str) -> None:
    """Also if it is not the same signal; the lifespan still ends in an orderly way."""
    with Program("-m", "tests.helpers.signalled", way, moment, loop_name, *BOTH) as program:
        program.wait_for("holding")
        program.send(signal.SIGTERM)
        program.wait_for("aioserve: SIGTERM")
        program.send(signal.SIGINT)
        assert program.end() == (0, "")
    rest = program.masked[program.masked.index("cancelled /hold") :]
    assert [line for line in rest if not line.startswith("aioserve: ")] == [
        "cancelled /hold",
        "shutdown",
        "lifespan over",
        CLOSED,
        END,
    ]


@pytest.mark.parametrize("loop_name", LOOPS)
def test_sigterm_is_not_handled_by_default(loop_name: str) -> None:
    """The program here has no handler for it, and dies of it."""
    with Program("-m", "tests.helpers.signalled", "serving", "body", loop_name) as program:
        program.wait_for("uvicorn.error: Uvicorn running on")
        program.send(signal.SIGTERM)
        assert program.end() == (-signal.SIGTERM, "")
    assert [line for line in program.masked if line != "the body runs"] == ["startup", SERVING]


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_is_handled_by_asyncio_by_default(way: str, loop_name: str) -> None:
    """It cancels the main task, and `KeyboardInterrupt` comes out of `asyncio.run()`."""
    with Program("-m", "tests.helpers.signalled", way, "body", loop_name) as program:
        program.wait_for("uvicorn.error: Uvicorn running on")
        program.wait_until_asleep()  # asyncio itself does not wake up for a signal that comes just before it sleeps
        program.send(signal.SIGINT)
        code, err = program.end()
    assert code == -signal.SIGINT
    assert err.endswith("\nKeyboardInterrupt\n")
    assert program.masked[-2:] == ["lifespan over", CLOSED]


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.skipif(sys.platform != "linux", reason="it has to know when the program is asleep")
def test_second_ctrl_c_forces_the_stop_by_default(loop_name: str) -> None:
    """Through `asyncio.run()`, which cancels all remaining tasks."""
    with Program("-m", "tests.helpers.signalled", "serving", "second", loop_name) as program:
        program.wait_for("holding")
        program.send(signal.SIGINT)
        program.wait_for("the body is over")
        program.wait_until_asleep()
        program.send(signal.SIGINT)
        code, err = program.end()
    assert code == -signal.SIGINT
    assert err.endswith("\nKeyboardInterrupt\n")
    assert "cancelled /hold" in program.said
    assert "lifespan over" in program.said


def test_forked_process_does_not_handle_the_stop_signals_of_its_parent() -> None:
    """It dies of SIGTERM as usual, and the parent's server goes on."""
    with Program(*ALLOWED, "-c", FORKING) as program:
        assert program.end() == (0, "")
    assert program.said == [f"the fork died of {int(signal.SIGTERM)}", "the server goes on: True"]


FORKING = """
import asyncio, os, signal, time
from aioserve import serving
from tests.helpers.apps import App

async def main():
    async with serving(App(), stop_on_signals=True) as server:
        reading, writing = os.pipe()
        if not (pid := os.fork()):
            os.write(writing, b"!")
            for _ in range(6000):
                time.sleep(0.01)  # not signal.pause(): a signal that comes just before it would not end it
            os._exit(0)
        os.read(reading, 1)
        os.kill(pid, signal.SIGTERM)
        print("the fork died of", os.waitpid(pid, 0)[1])
        await asyncio.sleep(0)
        print("the server goes on:", server.is_serving())

asyncio.run(main())
"""


def test_second_stop_signal_ends_an_import_that_swallowed_the_first() -> None:
    """An exception that is raised in foreign code may be lost there."""
    with Program("-c", SWALLOWING) as program:
        program.wait_for("importing")
        program.send(signal.SIGTERM)
        program.wait_for("swallowed")
        program.send(signal.SIGTERM)
        assert program.end() == (0, "")
    assert program.said == ["importing", "swallowed"]


SWALLOWING = """
import asyncio
from aioserve import serve
asyncio.run(serve("tests.helpers.swallowing_module:app", stop_on_signals=True))
"""
