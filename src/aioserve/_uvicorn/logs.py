"""What of uvicorn's logging is used, and what is kept quiet."""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.utils import ClientDisconnected

from aioserve._log import logger

# What uvicorn logs of a handler that has left its response unfinished.
_UNFINISHED = tuple(
    f"ASGI callable returned without {what}."
    for what in ("starting response", "completing response", "completing handshake")
)

_EXPECTED = (asyncio.CancelledError, GeneratorExit, ClientDisconnected)


def pass_on_interrupts(handled: Any) -> None:
    """
    Let a `KeyboardInterrupt` that is raised in a handler, as by a second Ctrl+C, leave its task and the loop.

    uvicorn catches it, and logs it as an exception of the app's.
    """
    _replace_logger(handled, _interruptible_logger)


def silence_expected_errors(handled: Any, on_unfinished: Callable[[], object] | None = None) -> None:
    """
    Keep uvicorn from logging errors that the stop causes.

    That is the end of a handler that was cancelled, or whose loop was closed, a `send()` to a WebSocket that was
    refused, and a response that is left unfinished after a disconnect. One line of ours says what was forced.
    `on_unfinished` is called where a handler has left its response unfinished.
    """
    _replace_logger(
        handled, _quiet_logger if on_unfinished is None else lambda replaced: _QuietLogger(replaced, on_unfinished)
    )


def _replace_logger(handled: Any, make: Callable[[logging.Logger], _InterruptibleLogger]) -> None:
    has_logger = handled
    if isinstance(getattr(handled, "logger", None), logging.LoggerAdapter):  # the legacy WebSocket protocol's own
        has_logger = handled.logger
    logger = getattr(has_logger, "logger", None)
    if isinstance(logger, logging.Logger) and not isinstance(logger, _QuietLogger):
        has_logger.logger = make(logger.replaced if isinstance(logger, _InterruptibleLogger) else logger)


class _InterruptibleLogger(logging.Logger):
    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.name, logger.level)
        self.replaced = logger

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 (logging's own)
        return self.replaced.isEnabledFor(level)

    def error(self, msg: object, *args: object, **kwargs: Any) -> None:
        if isinstance(exc := kwargs.get("exc_info"), KeyboardInterrupt):
            raise exc
        super().error(msg, *args, **{"stacklevel": 2, **kwargs})

    def handle(self, record: logging.LogRecord) -> None:
        self.replaced.handle(record)


class _QuietLogger(_InterruptibleLogger):
    def __init__(self, logger: logging.Logger, on_unfinished: Callable[[], object] = lambda: None) -> None:
        super().__init__(logger)
        self._on_unfinished = on_unfinished

    def error(self, msg: object, *args: object, **kwargs: Any) -> None:
        if msg in _UNFINISHED:
            self._on_unfinished()
        else:
            super().error(msg, *args, **{"stacklevel": 3, **kwargs})

    def handle(self, record: logging.LogRecord) -> None:
        if record.exc_info is None or not _is_expected(record.exc_info[1]):
            super().handle(record)


def _is_expected(exc: BaseException | None) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        return exc.split(_EXPECTED)[1] is None
    return isinstance(exc, _EXPECTED)


_interruptible_logger = functools.cache(_InterruptibleLogger)
_quiet_logger = functools.cache(_QuietLogger)


def warn_if_unseen(*, level: str | int | None, access_log: bool) -> None:
    """Log it if these options, which ask for lines at level INFO, show nothing; one line for both."""
    asking = [("access_log=True", "uvicorn.access")] if access_log else []
    if level in ("info", "debug", "trace") or (isinstance(level, int) and level <= logging.INFO):
        asking.append((f"log_level={level!r}", "uvicorn.error"))
    for option, name in asking:
        asked = logging.getLogger(name)
        if not asked.hasHandlers():
            why = f"the logger {name} has no handler"
            remedy = 'call logging.basicConfig(level="INFO") before, or pass log_config=uvicorn.config.LOGGING_CONFIG'
        elif not asked.isEnabledFor(logging.INFO):
            why = f"the logger {name} is not enabled for INFO"
            remedy = 'pass log_level="info", or set the level of that logger'
        else:
            continue
        logger.warning("%s shows nothing, since %s; %s", option, why, remedy)
        return


def log_config(level: str | int | None) -> dict[str, Any]:
    """Return the logging of uvicorn's command line, but all on standard error, and with aioserve's logger."""
    import copy  # only for whole programs

    config = copy.deepcopy(LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    for formatter in config["formatters"].values():
        formatter["use_colors"] = sys.stderr is not None and sys.stderr.isatty()  # uvicorn asks standard output
    if level is None or level == "trace":
        level = "info" if level is None else "debug"
    level = level.upper() if isinstance(level, str) else level
    config["loggers"]["aioserve"] = {"handlers": ["default"], "level": level}
    return config
