"""What of uvicorn's logging is used, and what is kept quiet."""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from typing import Any

from uvicorn.config import LOGGING_CONFIG

logger = logging.getLogger("uvicorn.error")

# What uvicorn logs of a handler that has left its response unfinished.
_UNFINISHED = tuple(f"ASGI callable returned without {what} response." for what in ("starting", "completing"))

_EXPECTED = (asyncio.CancelledError, GeneratorExit)


def silence_expected_errors(handled: Any) -> None:
    """
    Keep uvicorn from logging what the stop brings about as an error of the app's.

    That is the end of a handler that was cancelled, or whose loop was closed, and a response that it leaves unfinished
    after a disconnect. One line of ours says it all.
    """
    has_logger = handled
    if isinstance(getattr(handled, "logger", None), logging.LoggerAdapter):  # the legacy WebSocket protocol's own
        has_logger = handled.logger
    logger = getattr(has_logger, "logger", None)
    if isinstance(logger, logging.Logger) and not isinstance(logger, _QuietLogger):
        has_logger.logger = _quiet_logger(logger)


class _QuietLogger(logging.Logger):
    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.name)
        self._logger = logger

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 (logging's own)
        return self._logger.isEnabledFor(level)

    def error(self, msg: object, *args: object, **kwargs: Any) -> None:
        if msg not in _UNFINISHED:
            super().error(msg, *args, **{"stacklevel": 2, **kwargs})

    def handle(self, record: logging.LogRecord) -> None:
        if record.exc_info is None or not isinstance(record.exc_info[1], _EXPECTED):
            self._logger.handle(record)


_quiet_logger = functools.cache(_QuietLogger)


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
