"""
What leaves the app of a framework is raised by the client for tests; what the framework answers itself is not.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import litestar
import pytest
import quart

from aioserve import testing
from aioserve.testing import app_errors, assert_nothing_left
from tests.helpers.apps import AppError

ERROR = AppError("the handler's own")


@pytest.fixture
async def nothing_is_left_in_the_loop() -> AsyncIterator[None]:
    """Check as everywhere, except for the pools of threads of the loop, which run synchronous functions."""
    async with assert_nothing_left():
        yield


def with_litestar(raises: bool) -> Any:
    @litestar.get("/")
    async def handler() -> None:
        raise ERROR

    def let_out(exc: Exception, scope: Any) -> None:
        raise exc

    return litestar.Litestar([handler], after_exception=[let_out] if raises else [], logging_config=None)


def with_quart(raises: bool) -> Any:
    app = quart.Quart("app")
    app.config["PROPAGATE_EXCEPTIONS"] = raises

    @app.get("/")
    async def handler() -> str:
        raise ERROR

    return app


def with_django(raises: bool) -> Any:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.integration.frameworks.django_settings")
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpRequest
    from django.urls import path

    async def handler(request: HttpRequest) -> None:
        raise ERROR

    settings.DEBUG_PROPAGATE_EXCEPTIONS = raises
    settings.ROOT_URLCONF = (path("", handler),)
    return get_asgi_application()


@pytest.fixture
def restored_settings() -> Iterator[None]:
    yield
    if "DJANGO_SETTINGS_MODULE" in os.environ:
        from django.conf import settings
        from django.urls import clear_url_caches, set_urlconf

        settings.ROOT_URLCONF = "tests.integration.frameworks.with_django"
        settings.DEBUG_PROPAGATE_EXCEPTIONS = False
        clear_url_caches()
        set_urlconf(None)


@pytest.mark.parametrize("make", [with_litestar, with_quart, with_django])
async def test_exception_is_raised_if_the_framework_lets_it_out(
    make: Callable[[bool], Any], restored_settings: None
) -> None:
    """Each of them answers with a 500 by default, and has a setting that lets exceptions out."""
    for raises in (False, True):
        async with testing.client(make(raises)) as client:
            if not raises:
                assert (await client.get("/")).status_code == 500
                continue
            with pytest.raises((AppError, ExceptionGroup)) as caught:
                await client.get("/")
            raised = caught.value
            while isinstance(raised, ExceptionGroup):  # Quart's handlers run in a task group
                (raised,) = raised.exceptions
            assert raised is ERROR
    assert not app_errors._untaken
