"""
Signals that somebody else takes over while the app starts: what a program is told, and what our own process does.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from aioserve import serving_process
from aioserve._signals import Signals
from tests.conftest import LOOPS
from tests.helpers import not_portable
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.ways import WAYS, Way


class Starting(App):
    """An app that does something at its startup, and again what undoes that at its shutdown."""

    def __init__(self, do: Callable[[], object], undo: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.do = do
        self.undo = undo

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.do()
        try:
            await super().lifespan(scope, receive, send)
        finally:
            self.undo()


def apps_handler(signum: int, frame: FrameType | None) -> None:
    """Handle a signal for the app."""


def apps_callback() -> None:
    """Handle a signal for the app, in the loop."""


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "aioserve" and each.levelno >= logging.WARNING]


# In somebody else's program.


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_program_whose_stop_signal_was_replaced_gets_one_warning(
    way: Way, calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It names the signal and the function, and the other signal is not mentioned."""
    app = Starting(lambda: signal.signal(signal.SIGTERM, apps_handler))
    await way(app, closing, stop_on_signals=True)
    (line,) = warnings_in(caplog)
    assert line.startswith("stop_on_signals: SIGTERM will not stop http://127.0.0.1:")
    assert f"replaced by {apps_handler!r}; call server.close() there, and await server.wait_closed() in the bl" in line
    assert signal.getsignal(signal.SIGTERM) is apps_handler  # it is restored by the fixture


async def closing(server: Any) -> None:
    server.close()


@not_portable.loops_signals
async def test_warning_names_the_callback_that_was_given_to_the_loop(
    calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The handler that the loop installs says nothing."""
    loop = asyncio.get_running_loop()
    app = Starting(
        lambda: loop.add_signal_handler(signal.SIGTERM, apps_callback),
        lambda: loop.remove_signal_handler(signal.SIGTERM),
    )
    await WAYS["serving"](app, closing, stop_on_signals=True)
    (line,) = warnings_in(caplog)
    assert "replaced by add_signal_handler() with <Handle apps_callback" in line


async def test_warning_that_cannot_be_logged_does_not_fail_the_start(calls: list[str]) -> None:
    """The handler's `repr()` raises."""

    class Unprintable:
        def __call__(self, signum: int, frame: FrameType | None) -> None: ...

        def __repr__(self) -> str:
            raise ValueError("no repr")

    await WAYS["serving"](Starting(lambda: signal.signal(signal.SIGTERM, Unprintable())), closing, stop_on_signals=True)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_handler_that_the_app_has_put_back_is_no_reason_for_a_warning(
    way: Way, calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A signal that comes then stops the server."""

    def replace_and_restore() -> None:
        found = signal.signal(signal.SIGTERM, apps_handler)
        signal.signal(signal.SIGTERM, found)

    async def body(server: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        await server.wait_closed() if way is WAYS["start"] else await asyncio.Event().wait()

    await way(Starting(replace_and_restore), body, stop_on_signals=True)
    assert warnings_in(caplog) == []
    assert calls == []


@not_portable.child_processes
async def test_program_that_starts_a_child_process_gets_the_same_warning(
    calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Other code of the program has replaced the handler in the meantime."""
    asyncio.get_running_loop().call_soon(signal.signal, signal.SIGTERM, apps_handler)
    async with serving_process("tests.helpers.apps:factory", factory=True, stop_on_signals=True):
        pass
    (line,) = warnings_in(caplog)
    assert line.startswith("stop_on_signals: SIGTERM will not stop http://127.0.0.1:")


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
async def test_program_whose_stop_signal_has_no_handler_any_more_is_not_told_to_close_there(
    handler: signal.Handlers, calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    app = Starting(lambda: signal.signal(signal.SIGTERM, handler))
    await WAYS["serving"](app, closing, stop_on_signals=True)
    (line,) = warnings_in(caplog)
    assert line.endswith(f"was replaced by {handler!r}; do not replace it in the app")


def test_handler_of_an_asyncio_runner_is_no_reason_for_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """It was there before ours."""

    async def main() -> None:
        await WAYS["serving"](App(), closing, stop_on_signals=True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        asyncio.run(main())
    finally:
        signal.signal(signal.SIGINT, before)
    assert warnings_in(caplog) == []


# In our own process.


@pytest.fixture(params=["asyncio", "uvloop"])
def own(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[[Signals], None]], Signals]]:
    """Return a function that calls another in a loop of our own, with the signals of our own process."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def run(act: Callable[[Signals], None]) -> Signals:
        signals = Signals((signal.SIGINT, signal.SIGTERM), owns_process=True)

        async def main() -> None:
            signals.install()
            act(signals)
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # uvloop's call_soon_threadsafe() takes one more turn
            signals.release()

        with asyncio.Runner(**LOOPS[request.param]) as runner:
            runner.run(main())
        return signals

    yield run
    for signum, handler in before.items():
        signal.signal(signum, handler)


Own = Callable[[Callable[[Signals], None]], Signals]


def test_handler_that_calls_ours_counts_a_signal_once(own: Own) -> None:
    """A second count would force the stop."""
    called: list[str] = []

    def act(signals: Signals) -> None:
        found: Any = signal.getsignal(signal.SIGTERM)

        def chaining(signum: int, frame: FrameType | None) -> None:
            called.append("app")
            found(signum, frame)

        signal.signal(signal.SIGTERM, chaining)
        signals.take_back()
        signal.raise_signal(signal.SIGTERM)

    signals = own(act)
    assert (signals.count, signals.first, called) == (1, "SIGTERM", ["app"])


def test_handlers_of_two_parts_of_the_app_are_called_both(own: Own) -> None:
    """One was installed by its import, and the other by its startup, which calls the first."""
    called: list[str] = []

    def act(signals: Signals) -> None:
        signal.signal(signal.SIGTERM, lambda *_: called.append("import"))
        signals.take_back()
        found: Any = signal.getsignal(signal.SIGTERM)

        def calling_the_first(signum: int, frame: FrameType | None) -> None:
            called.append("startup")
            found(signum, frame)

        signal.signal(signal.SIGTERM, calling_the_first)
        signals.take_back()
        signal.raise_signal(signal.SIGTERM)

    assert (own(act).count, called) == (1, ["startup", "import"])


def test_handler_of_the_app_is_not_called_when_the_app_has_put_ours_back(own: Own) -> None:
    """As code does that restores what it has found, at its end."""
    called: list[str] = []

    def act(signals: Signals) -> None:
        found = signal.signal(signal.SIGTERM, lambda *_: called.append("app"))
        signals.take_back()
        signal.signal(signal.SIGTERM, found)
        signal.raise_signal(signal.SIGTERM)

    assert (own(act).count, called) == (1, [])


def test_handler_that_was_there_before_ours_is_taken_for_none_of_the_apps(own: Own) -> None:
    """asyncio.Runner's handler for SIGINT would cancel the task of the command line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that the runner installs its own

    def act(signals: Signals) -> None:
        (ours,) = [each for each in signals._handlers if each.signum == signal.SIGINT]
        assert "_on_sigint" in repr(ours.previous)
        signal.signal(signal.SIGINT, ours.previous)
        signals.take_back()
        signal.raise_signal(signal.SIGINT)

    assert own(act).first == "SIGINT"


def test_handlers_that_were_there_before_are_restored_after_they_were_taken_back(own: Own) -> None:
    """Those of the app have ended with the app."""
    signal.signal(signal.SIGTERM, apps_handler)

    def act(signals: Signals) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        signals.take_back()

    own(act)
    assert signal.getsignal(signal.SIGTERM) is apps_handler


def test_callback_of_the_loop_is_called_in_its_context_and_until_it_is_removed(own: Own) -> None:
    """And only for its own signal; what the loop refuses is refused."""
    called: list[str] = []
    variable = contextvars.ContextVar("variable", default="not set")

    def act(signals: Signals) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, called.append, "replaced")
        variable.set("set")
        loop.add_signal_handler(signal.SIGTERM, lambda end: called.append(variable.get() + end), "!")
        variable.set("set later")
        with pytest.raises(TypeError, match="coroutines cannot be used"):
            loop.add_signal_handler(signal.SIGTERM, asyncio.sleep, 0)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert loop.remove_signal_handler(signal.SIGTERM) is True
        assert loop.remove_signal_handler(signal.SIGTERM) is False
        signal.raise_signal(signal.SIGTERM)

    assert (own(act).count, called) == (3, ["set!"])


def test_signals_still_wake_the_loop_when_the_app_has_removed_its_last_callback(own: Own) -> None:
    """Then asyncio's loop unsets the wake-up descriptor."""

    def act(signals: Signals) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, apps_callback)
        assert loop.remove_signal_handler(signal.SIGUSR1) is True
        fd = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
        assert fd != -1

    own(act)
