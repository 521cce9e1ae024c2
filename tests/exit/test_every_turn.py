"""
The walk: a run of start, request and stop is interrupted at every turn of the loop, for each way to start.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version

import pytest

from aioserve import ServerCrashedError, ShutdownError, StartupError, StartupInterruptedError
from tests.helpers.turns import after
from tests.helpers.walk import (
    WAYS,
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

pytestmark = [pytest.mark.usefixtures("short_grace"), pytest.mark.parametrize("way", WAYS)]

Record = Callable[[str, object], None]

# What comes out of a task group after two cancellations, or after one and an error of its child, is decided by anyio.
# Sometimes anyio 4.16 takes one of them for its own, also in a group without aioserve.
GROUP = "serve in a task group"

# Before anyio 4.16, a scope (also that of a task group) sometimes took a native cancellation for its own, also without
# aioserve.
ANYIO_TELLS_THEM_APART = tuple(map(int, version("anyio").split(".")[:2])) >= (4, 16)


def skip_if_anyio_confuses_them(way: str) -> None:
    if way == GROUP and not ANYIO_TELLS_THEM_APART:
        pytest.skip("before anyio 4.16, a group could take a native cancellation for its own")


# The number of turns between two interruptions of one run.
APART = (0, 1, 2, 4, 7)


@pytest.mark.parametrize("interrupt", [natively, by_scope, by_timeout, by_sibling], ids=lambda each: each.__name__)
async def test_block_can_be_cancelled_once_at_every_turn(
    way: str, interrupt: Interruption, record_property: Record
) -> None:
    """The cancellation comes out, is counted once, and leaves nothing."""
    skip_if_anyio_confuses_them(way)
    record_property("points", await walk(partial(Run, way), interrupt))


@pytest.mark.parametrize("apart", APART)
async def test_block_can_be_cancelled_twice_at_every_turn(way: str, apart: int, record_property: Record) -> None:
    """Both are counted; the second one may force the stop."""

    async def twice(run: Run, turn: int) -> bool:
        return await natively(run, turn, turn + apart, judge=way != GROUP)

    record_property("points", await walk(partial(Run, way), twice))


@pytest.mark.parametrize("apart", [-4, -1, *APART])
async def test_block_can_be_cancelled_natively_and_by_a_scope_at_every_turn(
    way: str, apart: int, record_property: Record
) -> None:
    """Whichever comes first, the native one comes out of the scope, which does not take it for its own."""

    judge = way != GROUP and ANYIO_TELLS_THEM_APART

    async def both(run: Run, turn: int) -> bool:
        return await by_scope(run, turn, native=max(turn + apart, 0), judge=judge)

    record_property("points", await walk(partial(Run, way), both))


@pytest.mark.parametrize("timeout", [None, 0], ids=["gracefully", "by force"])
async def test_server_can_be_closed_at_every_turn(way: str, timeout: float | None, record_property: Record) -> None:
    """The run ends normally; only a server that is closed by force before the app has started has failed to start."""

    async def close(run: Run, turn: int) -> bool:
        def act() -> None:
            # The app gets its server before anybody else does.
            if run.app.state is not None:
                run.app.state["aioserve"].close(timeout=timeout)

        return await undisturbed(run, turn, act, lambda error: timeout == 0 and isinstance(error, StartupError))

    record_property("points", await walk(partial(Run, way), close))


OURS = (StartupError, ServerCrashedError, ShutdownError)


@pytest.mark.parametrize("name", ["aioserve http", "aioserve lifespan"])
async def test_tasks_of_the_server_can_be_cancelled_at_every_turn(way: str, name: str, record_property: Record) -> None:
    """
    Only `asyncio.run()` does so, at its end.

    Cancelling the server's task forces the stop, or makes the start fail; cancelling the lifespan's task is a crash.
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

    record_property("points", await walk(partial(Run, way), cancel))


@pytest.mark.parametrize("apart", [-4, -1, *APART])
@pytest.mark.parametrize("scoped", [False, True], ids=["natively", "by a scope"])
async def test_cancellation_wins_over_a_crash_at_every_turn(
    way: str, scoped: bool, apart: int, record_property: Record
) -> None:
    """
    The cancellation wins if it comes before the block is over; and the two are never confused.

    Where the caller's own `finally` calls `aclose()`, what it raises replaces the cancellation.
    """

    async def die(run: Run, turn: int) -> bool:
        after(turn, run.app.raise_now)
        cancel_at = max(turn + apart, 0)

        def crashed(error: BaseException) -> bool:
            return error.__cause__ is run.app.error

        if scoped:
            return await by_scope(run, cancel_at, accept=crashed)
        return await natively(run, cancel_at, accept=crashed, judge=way not in (GROUP, "start"))

    record_property("points", await walk(partial(Run, way), die))


@pytest.mark.parametrize(
    "make_error",
    [LookupError, partial(SystemExit, 7), KeyboardInterrupt],
    ids=["an error", "SystemExit", "KeyboardInterrupt"],
)
async def test_lifespan_can_raise_at_every_turn(
    way: str, make_error: Callable[[], BaseException], record_property: Record
) -> None:
    """Its own exception is the cause of the error, also one that would end the program."""

    async def die(run: Run, turn: int) -> bool:
        run.app.error = make_error()
        return await dying(run, turn, run.app.raise_now)

    record_property("points", await walk(partial(Run, way), die))


@pytest.mark.parametrize("swappable", [False, True], ids=["", "in a Swappable"])
@pytest.mark.parametrize("apart", [None, -4, -1, *APART])
async def test_lifespan_that_raises_before_it_is_told_to_shut_down_has_crashed(
    way: str, apart: int | None, swappable: bool, record_property: Record
) -> None:
    """Also in the turn in which the body ends, or in which the server is asked to close; and only then."""

    async def die(run: Run, turn: int) -> bool:
        def close() -> None:
            if run.server is not None:
                run.server.close()

        if apart is not None:
            after(max(turn + apart, 0), unless_over(run, close))
        return await dying(run, turn, run.app.raise_now)

    record_property("points", await walk(partial(Run, way, swappable=swappable), die))


async def dying(run: Run, turn: int, die: Callable[[], object]) -> bool:
    """Let the lifespan raise: the server's error is of the kind that the app knows, and no other comes out."""

    def accept(failed: BaseException) -> bool:
        assert run.app.state is not None
        # An app of a `Swappable` can raise when it has started itself, and its server has not.
        started = run.app.state["aioserve"]._engine.started
        return type(failed) is (run.app.raised if started else StartupError) and failed.__cause__ is run.app.error

    came = await undisturbed(run, turn, die, accept)
    if run.app.raised is not None:
        assert run.app.state is not None
        error = run.app.state["aioserve"]._engine.error
        assert error is not None
        assert accept(error), (run.app.raised, error)
    return came


async def test_lifespan_can_hang_at_every_turn(way: str, record_property: Record) -> None:
    """It is cancelled when its time is over; the cause of the error is a `TimeoutError`."""

    async def hang(run: Run, turn: int) -> bool:
        return await undisturbed(
            run,
            turn,
            run.app.hang_now,
            lambda failed: isinstance(failed, OURS) and isinstance(failed.__cause__, TimeoutError),
        )

    make = partial(Run, way, startup_timeout=0.01, shutdown_timeout=0)
    record_property("points", await walk(make, hang))


@pytest.fixture
def sigusr1() -> Iterator[None]:
    """Ignore the signal while the run does not handle it."""
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: None)
    yield
    signal.signal(signal.SIGUSR1, before)


def stopped_by_signal(error: BaseException) -> bool:
    return isinstance(error, StartupInterruptedError) and "SIGUSR1" in str(error)


@pytest.mark.usefixtures("sigusr1")
@pytest.mark.parametrize("apart", [None, *APART])
async def test_stop_signal_can_come_at_every_turn(way: str, apart: int | None, record_property: Record) -> None:
    """The run completes, or has failed to start; no cancellation is counted. A second signal may force the stop."""

    async def come(run: Run, turn: int) -> bool:
        if apart is not None:
            after(turn + apart, unless_over(run, partial(signal.raise_signal, signal.SIGUSR1)))
        return await undisturbed(run, turn, partial(signal.raise_signal, signal.SIGUSR1), stopped_by_signal)

    make = partial(Run, way, stop_on_signals=[signal.SIGUSR1])
    record_property("points", await walk(make, come))


@pytest.mark.usefixtures("sigusr1")
async def test_stop_signal_can_come_while_the_loop_is_tried(
    way: str, forget_loops: Callable[[], None], record_property: Record
) -> None:
    """At every turn of the first start on a loop; the start is given up, and no cancellation comes out."""

    async def come(run: Run, turn: int) -> bool:
        forget_loops()
        return await undisturbed(run, turn, partial(signal.raise_signal, signal.SIGUSR1), stopped_by_signal)

    make = partial(Run, way, stop_on_signals=[signal.SIGUSR1])
    record_property("points", await walk(make, come, step=1))  # the trial takes few turns


@pytest.mark.parametrize("interrupt", [natively, by_scope], ids=lambda each: each.__name__)
async def test_start_can_be_cancelled_while_the_loop_is_tried(
    way: str, interrupt: Interruption, forget_loops: Callable[[], None], record_property: Record
) -> None:
    """As at every other turn."""
    skip_if_anyio_confuses_them(way)

    async def cancel(run: Run, turn: int) -> bool:
        forget_loops()
        return await interrupt(run, turn)

    record_property("points", await walk(partial(Run, way), cancel, step=1))


@pytest.mark.usefixtures("sigusr1")
@pytest.mark.parametrize("apart", [-4, -1, *APART])
@pytest.mark.parametrize("scoped", [False, True], ids=["natively", "by a scope"])
async def test_cancellation_wins_over_a_stop_signal_at_every_turn(
    way: str, scoped: bool, apart: int, record_property: Record
) -> None:
    """And the two are never confused."""

    async def come(run: Run, turn: int) -> bool:
        after(turn, unless_over(run, partial(signal.raise_signal, signal.SIGUSR1)))
        cancel_at = max(turn + apart, 0)
        judge = way != GROUP and (ANYIO_TELLS_THEM_APART or not scoped)
        interrupt = by_scope if scoped else natively
        return await interrupt(run, cancel_at, accept=stopped_by_signal, judge=judge)

    make = partial(Run, way, stop_on_signals=[signal.SIGUSR1])
    record_property("points", await walk(make, come))
