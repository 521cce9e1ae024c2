"""
Django, which has one app in a process: it uses the current play.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

from tests.integration.frameworks import FIRST, LAST, Play, received

on: Play


def make(play: Play) -> Any:
    global on
    on = play
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.integration.frameworks.django_settings")
    return get_asgi_application()


async def as_json(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"hello": "world"})


def form(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"name": request.POST["name"], **received(request.FILES["file"].read())})


async def body(request: HttpRequest) -> HttpResponse:
    return JsonResponse(received(request.read()))


async def hold(request: HttpRequest) -> HttpResponse:
    await on.hold()
    return HttpResponse("held")


def sync(request: HttpRequest) -> HttpResponse:
    on.hold_thread()
    return HttpResponse("held")


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def chunks() -> AsyncIterator[bytes]:
        yield FIRST
        await on.hold()
        yield LAST

    return StreamingHttpResponse(chunks())


async def events(request: HttpRequest) -> StreamingHttpResponse:
    stopping = request.scope["state"]["aioserve"].stopping

    async def chunks() -> AsyncIterator[str]:
        yield "data: hello\n\n"
        await stopping.wait()
        yield "data: the end\n\n"

    return StreamingHttpResponse(chunks(), content_type="text/event-stream")


async def endless(request: HttpRequest) -> StreamingHttpResponse:
    async def chunks() -> AsyncIterator[str]:
        try:
            yield "data: hello\n\n"
            await asyncio.Event().wait()
        finally:
            on.note("stream over")

    return StreamingHttpResponse(chunks(), content_type="text/event-stream")


urlpatterns = [
    path("json", as_json),
    path("form", form),
    path("body", body),
    path("hold", hold),
    path("sync", sync),
    path("stream", stream),
    path("events", events),
    path("endless", endless),
]
