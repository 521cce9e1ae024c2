"""
The exceptions of aioserve, and what its public classes call themselves.

Where Python has a word already, that word stays: a busy port is an `OSError`, a misspelt option is a `TypeError`, a
value out of range is a `ValueError`. `__cause__` is the app's own
exception, unchanged, where there is one; for an app in a child process, a note has its traceback as text.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T", bound=Any)


def public(found: T) -> T:
    """Let a class or a function show under the name that users import, like `aioserve.Server`."""
    found.__module__ = "aioserve"
    with suppress(AttributeError):  # or `inspect.getsource()` would take that line of the package's `__init__.py`
        del found.__firstlineno__
    return found


@public
class ServingError(Exception):
    """
    The base class of aioserve's own errors.

    Catch it to tell "the server failed" from "my code failed".
    """


@public
class StartupError(ServingError):
    """
    The app could not be imported, built by its factory, or started by its lifespan.

    The block's body has not run, and nothing is left of the server. `__cause__` is the app's own exception, if there is
    one.
    """


@public
class StartupTimeoutError(StartupError):
    """
    The app's lifespan did not finish its startup within `startup_timeout` seconds.

    This is not a `TimeoutError`, because a `TimeoutError` is an `OSError` and would look like a busy port. Its
    `__cause__` is a `TimeoutError`.
    """


@public
class StartupInterruptedError(StartupError):
    """
    The server was told to stop before it had started: by one of the `stop_on_signals`, or by ``close(timeout=0)``.

    Its `__cause__` is `None`. `serve()` returns normally after a signal.
    """


@public
class ServerCrashedError(ServingError):
    """
    The server died. In a block that was running, the body is cancelled.

    `__cause__` is the exception that the app's lifespan raised before it was told to shut down. If that happens while a
    stop waits for requests, this is raised as well, but the body is not cancelled.
    """


@public
class ShutdownError(ServingError):
    """
    The app's lifespan failed at its shutdown, or did not finish it in time.

    The port is free. `__cause__` is the app's own exception, or a `TimeoutError`.
    """


# An app's exception can have a `__str__` that raises or returns no string, and can refuse notes. What is to be said of
# it must not be lost for that.


def describe_error(error: BaseException | None) -> str:
    """Return the type and the message of an exception; of a group with a single exception, those of that exception."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return f"{type(error).__name__}: {message_of(error)}"


def message_of(error: BaseException | None) -> str:
    try:
        return str(error)
    except Exception as exc:  # noqa: BLE001
        return f"(its message cannot be read: __str__ raised {type(exc).__name__})"


def add_note(error: BaseException, note: str) -> None:
    with suppress(Exception):
        error.add_note(note)
