"""
What can go wrong, by name.

Where Python has a word already, that word stays: a busy port is an `OSError`, a misspelt option is a `TypeError`, a
value out of range is a `ValueError`. The classes here name only what Python has no word for. Each carries the app's own
exception, untouched, as its `__cause__`.
"""

from __future__ import annotations


class ServingError(Exception):
    """
    The base of every error that is aioserve's own.

    Catch it to tell "the server failed" from "my code failed".
    """


class StartupError(ServingError):
    """
    The app could not be imported, built by its factory, or started by its lifespan.

    The block's body has not run, and nothing is left of the server. `__cause__` is the app's own exception; it is
    `None` only where the app gave none, as with a bare ``lifespan.startup.failed``.
    """


class StartupTimeoutError(StartupError):
    """
    The app's lifespan did not finish its startup within `startup_timeout` seconds.

    This is not a `TimeoutError`, since that is an `OSError` and would pass for a busy port; its `__cause__` is one.
    """


class StartupInterruptedError(StartupError):
    """
    The server was told to stop before it had started: by a signal that `stop_on_signals` asked for, or by
    `close(timeout=0)`.

    Nothing has failed, hence there is no `__cause__`. `serve()` returns normally after a signal.
    """


class ServerCrashedError(ServingError):
    """
    The server died while the block's body was running; the body has been cancelled.

    `__cause__` says of what: the exception that the app's lifespan raised in the middle of serving.
    """


class ShutdownError(ServingError):
    """
    The app's lifespan failed at its shutdown, or did not finish it in time.

    By then the requests have been answered and the port is free. `__cause__` is the app's own exception, or a
    `TimeoutError`.
    """
