"""
What aioserve logs: on the logger `aioserve`, and for uvicorn's events on uvicorn's own.

A handler or a filter of the program's that raises must not stop a server half way. So its exception is printed, as
`logging` itself does it with most of them.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Any


class Logger:
    """Logs without ever raising."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        self._log(logging.DEBUG, message, args, exc_info)

    def info(self, message: str, *args: object) -> None:
        if self._logger.isEnabledFor(logging.INFO):  # asked here, since each start and stop comes here
            self._log(logging.INFO, message, args)

    def warning(self, message: str, *args: object) -> None:
        self._log(logging.WARNING, message, args)

    def error(self, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        self._log(logging.ERROR, message, args, exc_info)

    def _log(self, level: int, message: str, args: Any, exc_info: BaseException | None = None) -> None:
        try:
            self._logger.log(level, message, *args, exc_info=exc_info, stacklevel=3)
        except Exception:  # noqa: BLE001 (anything can be in the program's handlers)
            if logging.raiseExceptions and sys.stderr is not None:
                traceback.print_exc()


logger = Logger("aioserve")
uvicorn_logger = Logger("uvicorn.error")
