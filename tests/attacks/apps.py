"""
Apps for the programs of these tests, by import string.
"""

from __future__ import annotations

import os

from tests.helpers.apps import App, AppError, Receive, Scope, Send


class Writing(App):
    """Writes "written" to the descriptor whose number is the request's path."""

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        os.write(int(scope["path"][1:]), b"written\n")
        await super().request(scope, receive, send)


class UnreadableError(AppError):
    """An exception without a message that can be read."""

    def __str__(self) -> str:
        raise LookupError("no message")


def unreadable_factory() -> App:
    raise UnreadableError


class Unreadable(App):
    """Raises `UnreadableError` in its lifespan; as soon as a request comes, if it has started."""

    def __init__(self, startup: str = "completes", shutdown: str = "completes") -> None:
        super().__init__(startup, shutdown)
        self.error = UnreadableError()

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.crash.set()


writing = Writing()
unreadable = Unreadable()
unreadable_at_startup = Unreadable(startup="raises")
unreadable_at_shutdown = Unreadable(shutdown="raises")
