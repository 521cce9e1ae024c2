"""
What users pass in place of an app.
"""

from __future__ import annotations

from typing import Any

from tests.helpers.apps import Receive, Scope, Send, without_lifespan


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    return []


class Wsgi:
    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        return []


def no_coroutine(scope: Scope, receive: Receive, send: Send) -> Any:
    return without_lifespan(scope, receive, send)


async def endpoint(request: object) -> str:
    return ""


async def make_app() -> Any:
    return without_lifespan


async def with_defaults(scope: Scope | None = None, receive: Receive | None = None, send: Send | None = None) -> None:
    pass


def five(one: int, two: int, three: int, four: int, five: int) -> None:
    pass


class Application:
    """An app of ASGI 3, by its instances."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await without_lifespan(scope, receive, send)

    async def method(self, scope: Scope, receive: Receive, send: Send) -> None:
        await without_lifespan(scope, receive, send)


class Asgi2:
    """An app of ASGI 2, by its class."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, receive: Receive, send: Send) -> None:
        await without_lifespan(self.scope, receive, send)


class AwaitedClass:
    """An app of ASGI 3, by its class."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.arguments = scope, receive, send

    def __await__(self) -> Any:
        return without_lifespan(*self.arguments).__await__()


def asgi2(scope: Scope) -> Any:
    async def instance(receive: Receive, send: Send) -> None:
        await without_lifespan(scope, receive, send)

    return instance


def make_wsgi() -> Any:
    return Wsgi()


def make_asgi2() -> Any:
    return asgi2
