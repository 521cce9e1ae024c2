"""
It cannot be cancelled at a bad moment: every turn of the loop is tried, for each door, in each way.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version

import pytest

from aioserve import ServerCrashedError, ShutdownError, StartupError, StartupInterruptedError
from tests.turns import after
from tests.walk import (
    DOORS,
    Interruption,
    Run,
    by_scope,
    by_sibling,
    by_timeout,
    natively,
    undisturbed,
    unless_over,
    walk,
)

pytestmark = [pytest.mark.usefixtures("short_grace"), pytest.mark.parametrize("door", DOORS)]

Record = Callable[[str, object], None]

# What comes of two cancellations of a task group, or of one and an error of its child, is for anyio to say: now and
# then, it (4.16) takes one of them for its own, and does so in a group that has never heard of us.
GROUP = "serve in a task group"

# Before anyio 4.16, a scope (a task group's, too) now and then took a native cancellation for its own, also where there
# was nothing but the scope.
ANYIO_TELLS_THEM_APART = tuple(map(int, version("anyio").split(".")[:2])) >= (4, 16)

# How far apart two interruptions of one run are, in turns.
APART = (0, 1, 2, 4, 7)


@pytest.mark.parametrize("interrupt", [natively, by_scope, by_timeout, by_sibling], ids=lambda each: each.__name__)
async def test_cancelled_once(door: str, interrupt: Interruption, record_property: Record) -> None:
    """The cancellation comes out, is counted once, and leaves nothing."""
    if door == GROUP and not ANYIO_TELLS_THEM_APART:
        pytest.skip("before anyio 4.16, a group could take a native cancellation for its own")
    record_property("points", await walk(partial(Run, door), interrupt))


@pytest.mark.parametrize("apart", APART)
async def test_cancelled_twice(door: str, apart: int, record_property: Record) -> None:
    """Both are counted; the second one at most forces."""

    async def twice(run: Run, turn: int) -> bool:
        return await natively(run, turn, turn + apart, judge=door != GROUP)

    record_property("points", await walk(partial(Run, door), twice))


@pytest.mark.parametrize("apart", [-4, -1, *APART])
async def test_cancelled_natively_and_by_a_scope(door: str, apart: int, record_property: Record) -> None:
    """Whichever comes first: the native one comes out of the scope, which has no part in it."""

    judge = door != GROUP and ANYIO_TELLS_THEM_APART

    async def both(run: Run, turn: int) -> bool:
        return await by_scope(run, turn, native=max(turn + apart, 0), judge=judge)

    record_property("points", await walk(partial(Run, door), both))


@pytest.mark.parametrize("timeout", [None, 0], ids=["gracefully", "by force"])
async def test_told_to_close(door: str, timeout: float | None, record_property: Record) -> None:
    """It ends normally; told so before the app has started, and by force, it has failed to start."""

    async def close(run: Run, turn: int) -> bool:
        def act() -> None:
            # The app is told of its server, before anybody else is.
            if run.app.state is not None:
                run.app.state["aioserve"].close(timeout=timeout)

        return await undisturbed(run, turn, act, lambda error: timeout == 0 and isinstance(error, StartupError))

    record_property("points", await walk(partial(Run, door), close))


OURS = (StartupError, ServerCrashedError, ShutdownError)


@pytest.mark.parametrize("name", ["aioserve http", "aioserve lifespan"])
async def test_a_task_of_ours_is_cancelled(door: str, name: str, record_property: Record) -> None:
    """
    Nobody does that, but `asyncio.run()` at its end.

    It forces a server, which at the most has failed to start; and a lifespan that is cancelled has died of it.
    """

    async def cancel(run: Run, turn: int) -> bool:
        def act() -> None:
            for task in asyncio.all_tasks():
                if task.get_name().startswith(name):
                    task.cancel()

        def accept(error: BaseException) -> bool:
            if name == "aioserve http":
                return isinstance(error, StartupError)
            return isinstance(error, OURS) and isinstance(error.__cause__, asyncio.CancelledError)

        return await undisturbed(run, turn, act, accept)

    record_property("points", await walk(partial(Run, door), cancel))


@pytest.mark.parametrize("apart", [-4, -1, *APART])
@pytest.mark.parametrize("scoped", [False, True], ids=["natively", "by a scope"])
async def test_the_lifespan_dies_and_the_block_is_cancelled(
    door: str, scoped: bool, apart: int, record_property: Record
) -> None:
    """
    The cancellation wins, if it comes before the block is over; and the two are never taken for each other.

    Where `aclose()` stands in the caller's own `finally`, what it raises takes the place of the cancellation.
    """

    async def die(run: Run, turn: int) -> bool:
        after(turn, run.app.raise_now)
        cancel_at = max(turn + apart, 0)

        def crashed(error: BaseException) -> bool:
            return error.__cause__ is run.app.error

        if scoped:
            return await by_scope(run, cancel_at, accept=crashed)
        return await natively(run, cancel_at, accept=crashed, judge=door not in (GROUP, "start"))

    record_property("points", await walk(partial(Run, door), die))


@pytest.mark.parametrize(
    "make_error",
    [LookupError, partial(SystemExit, 7), KeyboardInterrupt],
    ids=["an error", "SystemExit", "KeyboardInterrupt"],
)
async def test_the_lifespan_raises(door: str, make_error: Callable[[], BaseException], record_property: Record) -> None:
    """Wherever it does, its own exception is the cause of ours; also one that would end the program."""

    async def die(run: Run, turn: int) -> bool:
        run.app.error = make_error()
        return await undisturbed(
            run, turn, run.app.raise_now, lambda failed: isinstance(failed, OURS) and failed.__cause__ is run.app.error
        )

    record_property("points", await walk(partial(Run, door), die))


async def test_the_lifespan_hangs(door: str, record_property: Record) -> None:
    """Wherever it does, it is cancelled when its time is over; the cause is a `TimeoutError`."""

    async def hang(run: Run, turn: int) -> bool:
        return await undisturbed(
            run,
            turn,
            run.app.hang_now,
            lambda failed: isinstance(failed, OURS) and isinstance(failed.__cause__, TimeoutError),
        )

    make = partial(Run, door, startup_timeout=0.01, shutdown_timeout=0)
    record_property("points", await walk(make, hang))


@pytest.fixture
def sigusr1() -> Iterator[None]:
    """Let the signal do nothing to a run that has not asked for it yet, or no more."""
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: None)
    yield
    signal.signal(signal.SIGUSR1, before)


def stopped_by_signal(error: BaseException) -> bool:
    return isinstance(error, StartupInterruptedError) and "SIGUSR1" in str(error)


@pytest.mark.usefixtures("sigusr1")
@pytest.mark.parametrize("apart", [None, *APART])
async def test_a_signal_comes(door: str, apart: int | None, record_property: Record) -> None:
    """The run completes, or has failed to start; to the task, it never was a cancellation. A second one may force."""

    async def come(run: Run, turn: int) -> bool:
        if apart is not None:
            after(turn + apart, unless_over(run, partial(signal.raise_signal, signal.SIGUSR1)))
        return await undisturbed(run, turn, partial(signal.raise_signal, signal.SIGUSR1), stopped_by_signal)

    make = partial(Run, door, stop_on_signals=[signal.SIGUSR1])
    record_property("points", await walk(make, come))


@pytest.mark.usefixtures("sigusr1")
@pytest.mark.parametrize("apart", [-4, -1, *APART])
@pytest.mark.parametrize("scoped", [False, True], ids=["natively", "by a scope"])
async def test_a_signal_comes_and_the_block_is_cancelled(
    door: str, scoped: bool, apart: int, record_property: Record
) -> None:
    """The cancellation wins, and the two are never taken for each other."""

    async def come(run: Run, turn: int) -> bool:
        after(turn, unless_over(run, partial(signal.raise_signal, signal.SIGUSR1)))
        cancel_at = max(turn + apart, 0)
        judge = door != GROUP and (ANYIO_TELLS_THEM_APART or not scoped)
        interrupt = by_scope if scoped else natively
        return await interrupt(run, cancel_at, accept=stopped_by_signal, judge=judge)

    make = partial(Run, door, stop_on_signals=[signal.SIGUSR1])
    record_property("points", await walk(make, come))
