"""
Exceptions of the app that cannot be printed, or that refuse notes: the errors that come of them are the usual ones.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from aioserve import (
    ServerCrashedError,
    ShutdownError,
    StartupError,
    Swappable,
    serving,
    serving_process,
    start,
    testing,
)
from tests.attacks.apps import UnreadableError
from tests.helpers import not_portable
from tests.helpers.apps import App, AppError
from tests.helpers.clients import connect, get
from tests.helpers.processes import asking, linux_only

pytestmark = pytest.mark.usefixtures("short_grace")


class NotAStringError(AppError):
    """An exception whose message is a number."""

    def __str__(self) -> str:
        return 42  # type: ignore[return-value]


class RefusingError(AppError):
    """An exception that takes no notes."""

    def add_note(self, note: str) -> None:
        raise LookupError(note)


class BrokenNotesError(AppError):
    """An exception whose notes are no list."""

    __notes__ = 42  # type: ignore[assignment]


class HiddenNotesError(AppError):
    """An exception whose notes cannot be read."""

    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        raise LookupError("no notes")


UNREADABLE = "(its message cannot be read: __str__ raised {})"
DESCRIPTIONS: dict[type[AppError], str] = {
    UnreadableError: "UnreadableError: " + UNREADABLE.format("LookupError"),
    NotAStringError: "NotAStringError: " + UNREADABLE.format("TypeError"),
    RefusingError: "RefusingError: as told",
    BrokenNotesError: "BrokenNotesError: as told",
    HiddenNotesError: "HiddenNotesError: as told",
}


@pytest.fixture(params=DESCRIPTIONS, ids=lambda kind: kind.__name__)
def error(request: pytest.FixtureRequest) -> AppError:
    made: AppError = request.param("as told")
    return made


@pytest.fixture
def described(error: AppError) -> str:
    return DESCRIPTIONS[type(error)]


def raising(error: BaseException, **when: str) -> App:
    app = App(**when)
    app.error = error
    return app


def assert_comes_from(raised: BaseException, error: BaseException, described: str) -> None:
    """Check an error of aioserve's that has an exception of the app as its cause."""
    assert raised.__cause__ is error
    assert str(raised).endswith(described)


async def test_startup_that_raises_an_odd_exception_is_a_startup_error(error: AppError, described: str) -> None:
    """The message says what can be said of it."""
    with pytest.raises(StartupError) as raised:
        await start(raising(error, startup="raises"))
    assert_comes_from(raised.value, error, described)


async def test_odd_exception_of_an_app_without_a_lifespan_is_ignored(
    error: AppError, described: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The app is served, and one line describes the exception."""
    caplog.set_level(logging.INFO, "aioserve")
    async with serving(raising(error, startup="raises early")) as server:
        assert (await get(server)).text == "hello"
    assert f"the app has no lifespan: {described}" in caplog.messages


async def test_shutdown_that_raises_an_odd_exception_is_a_shutdown_error(error: AppError, described: str) -> None:
    """After a block that ends normally."""
    with pytest.raises(ShutdownError) as raised:
        async with serving(raising(error, shutdown="raises")):
            pass
    assert_comes_from(raised.value, error, described)


async def test_crash_with_an_odd_exception_cancels_the_body(error: AppError, described: str) -> None:
    """What comes out has that very exception as its cause."""
    app = raising(error)
    cancelled = False
    with pytest.raises(ServerCrashedError) as raised:
        async with serving(app), asyncio.timeout(10):
            app.crash.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled = True
                raise
    assert cancelled
    assert_comes_from(raised.value, error, described)


async def test_crash_of_a_started_server_with_an_odd_exception_is_logged_and_raised(
    error: AppError, described: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The server closes."""
    app = raising(error)
    server = await start(app)
    app.crash.set()
    async with asyncio.timeout(10):
        with pytest.raises(ServerCrashedError) as raised:
            await server.wait_closed()
    assert_comes_from(raised.value, error, described)
    (line,) = (each.getMessage() for each in caplog.records if each.levelno == logging.ERROR)
    assert line.endswith(described)


async def test_factory_that_raises_an_odd_exception_is_a_startup_error(error: AppError, described: str) -> None:
    """As with any other exception of a factory."""

    def factory() -> Any:
        raise error

    with pytest.raises(StartupError, match="cannot load ") as raised:
        await start(factory, factory=True)
    assert_comes_from(raised.value, error, described)


async def test_odd_exception_of_the_body_comes_out_where_the_server_fails_as_well(
    error: AppError, caplog: pytest.LogCaptureFixture
) -> None:
    """A note that it refuses is not added; the server's error is logged in any case."""
    with pytest.raises(AppError) as raised:
        async with serving(App(shutdown="raises")):
            raise error
    assert raised.value is error
    (line,) = (each.getMessage() for each in caplog.records if each.levelno == logging.ERROR)
    assert line.endswith("AppError: the app's own")


async def test_body_gets_a_note_where_the_server_fails_with_an_odd_exception(error: AppError, described: str) -> None:
    """The body's exception comes out."""
    with pytest.raises(ZeroDivisionError) as raised:
        async with serving(raising(error, shutdown="raises")):
            raise ZeroDivisionError
    (note,) = raised.value.__notes__
    assert note.startswith("aioserve: the server failed as well: ShutdownError: ")
    assert note.endswith(described)


async def test_odd_exception_of_a_test_comes_out_of_a_test_server_that_was_forced(error: AppError) -> None:
    """A note would say which handlers were cancelled."""
    app = App()
    with pytest.raises(AppError) as raised:
        async with testing.server(app, shutdown_timeout=0.01) as server, connect(server) as client:
            client.ask("/hold")
            await app.holding.wait()
            raise error
    assert raised.value is error


async def test_new_app_that_raises_an_odd_exception_leaves_the_old_one_in_its_place(
    error: AppError, described: str
) -> None:
    """The swap raises an error that describes it."""
    swappable = Swappable(App())
    async with serving(swappable) as server:
        with pytest.raises(StartupError) as raised:
            await swappable.swap(raising(error, startup="raises"))
        assert_comes_from(raised.value, error, described)
        assert (await get(server)).text == "hello"


async def test_replaced_app_that_raises_an_odd_exception_has_ended(error: AppError, described: str) -> None:
    """The new one answers."""
    new = App()
    swappable = Swappable(raising(error, shutdown="raises"))
    async with serving(swappable) as server:
        with pytest.raises(ShutdownError) as raised:
            await swappable.swap(new)
        assert_comes_from(raised.value, error, described)
        assert (await get(server)).text == "hello"
    assert "answered /" in new.events


async def test_first_app_of_a_swappable_that_dies_of_an_odd_exception_is_a_crash(
    error: AppError, described: str
) -> None:
    """As without the `Swappable`."""
    app = raising(error)
    with pytest.raises(ServerCrashedError) as raised:
        async with serving(Swappable(app)), asyncio.timeout(10):
            app.crash.set()
            await asyncio.Event().wait()
    assert_comes_from(raised.value, error, described)


CHILD = "tests.attacks.apps:"
DESCRIBED = DESCRIPTIONS[UnreadableError]


@linux_only
@pytest.mark.parametrize(
    ("app", "options"),
    [("unreadable_at_startup", {}), ("unreadable_factory", {"factory": True})],
    ids=["startup", "factory"],
)
@not_portable.child_processes
async def test_odd_exception_at_the_start_of_a_child_process_is_a_startup_error(
    app: str, options: dict[str, Any]
) -> None:
    """Its description comes from the child."""
    async with asyncio.timeout(20):
        with pytest.raises(StartupError) as raised:
            async with serving_process(CHILD + app, **options):
                pass
    assert str(raised.value).endswith(DESCRIBED)


@linux_only
@not_portable.child_processes
async def test_odd_exception_in_a_child_process_that_serves_is_a_crash() -> None:
    """It cancels the body here."""
    async with asyncio.timeout(20):
        with pytest.raises(ServerCrashedError) as raised:
            async with serving_process(CHILD + "unreadable") as server, asking(server, "/"):
                await asyncio.Event().wait()
    assert str(raised.value).endswith(DESCRIBED)


@linux_only
@not_portable.child_processes
async def test_odd_exception_at_the_shutdown_of_a_child_process_is_a_shutdown_error() -> None:
    """The block has ended normally."""
    async with asyncio.timeout(20):
        with pytest.raises(ShutdownError) as raised:
            async with serving_process(CHILD + "unreadable_at_shutdown"):
                pass
    assert str(raised.value).endswith(DESCRIBED)
