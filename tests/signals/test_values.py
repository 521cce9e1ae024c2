"""
`stop_on_signals`: which values are accepted, and what is refused before anything starts.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

import pytest

from aioserve import _signals, serve, serving
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.clients import connect, get
from tests.helpers.ways import WAYS, Way


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@not_portable.loops_signals
async def test_signal_that_the_loop_already_handles_is_refused(way: Way, calls: list[str]) -> None:
    """And none of the other signals is handled."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, calls.append, "the loop's")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError, match=r"already handles SIGTERM .* call close"):
            await way(App(), never, stop_on_signals=True)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.01)
        assert calls == ["the loop's"]
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def never(_: object) -> None:
    raise AssertionError("the body ran")


def test_stop_on_signals_is_refused_outside_the_main_thread() -> None:
    """Python handles signals in the main thread only."""

    def elsewhere() -> None:
        try:
            asyncio.run(serve(App(), stop_on_signals=True))
        except RuntimeError as exc:
            said.append(str(exc))

    said: list[str] = []

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    (line,) = said
    assert line == (
        "stop_on_signals: Python handles SIGINT only in the main thread, and this server is to run in another one; "
        "handle it in the main thread and call close(), which is thread-safe"
    )


async def test_handler_that_could_not_be_restored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not set by Python."""
    monkeypatch.setattr(signal, "getsignal", lambda signum: None)
    with pytest.raises(RuntimeError, match="did not install and cannot restore"):
        await serve(App(), stop_on_signals=True)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (15, TypeError, "must be True, False, or a sequence of signals, not 15"),
        ("SIGTERM", TypeError, "must be True, False, or a sequence of signals, not 'SIGTERM'"),
        (None, TypeError, "must be True, False, or a sequence of signals, not None"),
        (["SIGTERM"], TypeError, "and not 'SIGTERM'"),
        ([True], TypeError, "and not True"),
        ([999], ValueError, "there is no signal 999"),
        ([signal.SIGTERM, signal.SIGKILL], ValueError, "a program cannot handle SIGKILL"),
        ([signal.SIGSEGV], ValueError, "a program cannot handle SIGSEGV"),
    ],
)
async def test_invalid_value_of_stop_on_signals_is_refused(value: Any, error: type[Exception], message: str) -> None:
    """The error names the value, and no handler is installed."""
    with pytest.raises(error, match=message):
        await serve(App(), stop_on_signals=value)


@pytest.mark.parametrize("value", [[], {signal.SIGUSR1}, (signal.SIGUSR1, signal.SIGUSR1)], ids=repr)
async def test_any_collection_of_signals_is_accepted(value: Any, calls: list[str]) -> None:
    """An empty one means no signals."""
    async with serving(App(), stop_on_signals=value) as server, connect(server):
        assert (await get(server)).text == "hello"
        assert isinstance(signal.getsignal(signal.SIGUSR1), _signals._Handler) == bool(value)
