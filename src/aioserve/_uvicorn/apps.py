"""What can be wrong with an app that uvicorn would serve nevertheless, and answer every request with an error."""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

from uvicorn import config

_is_async = getattr(config, "iscoroutinefunction", inspect.iscoroutinefunction)  # by which uvicorn tells ASGI 3 and 2


def name_of(app: Any) -> str:
    """Return what the user calls an app: its import string, its module and name, or the class of which it is."""
    if isinstance(app, config.Config):
        app = app.app
    if isinstance(app, str):
        return repr(app)
    if isinstance(app, types.ModuleType):
        return f"module {app.__name__}"
    for found, suffix in ((app, ""), (type(app), " object")):
        name = getattr(found, "__qualname__", None)
        if isinstance(name, str):
            return f"{found.__module__}:{name}{suffix}"
    return object.__repr__(app)


def mistake(app: Any, *, factory: bool, interface: str) -> str:
    """Say what is wrong with an app, and what to change; "" if nothing is known to be wrong."""
    if inspect.iscoroutine(app):
        app.close()  # or Python would warn that nobody has awaited it
        name = app.__name__
        instead = name if app.cr_code.co_argcount >= 3 else f"await {name}()"
        return f"a coroutine is not an app: write `{instead}`, not `{name}()`"
    name = name_of(app)
    if not callable(app):
        return _of_no_callable(app, name)
    if factory:
        return _of_factory(app, name)
    if _is_fastapi_router(app):
        return f"{name} is a router, not an app: call `app.include_router(router)` on a FastAPI app, and pass that app"
    if interface != "auto":
        return ""
    return _of_class(app, name) if isinstance(app, type) else _of_parameters(app, name)


def _of_no_callable(app: Any, name: str) -> str:
    if isinstance(app, types.ModuleType):
        attributes = [each for each in ("app", "application") if callable(getattr(app, each, None))]
        what = f"{app.__name__}.{attributes[0]}" if attributes else "the app in the module"
        return f"{name} is not an app: pass {what}"
    if type(app).__name__.endswith(("Router", "Blueprint")):
        return f"{name} is a router, not an app: add the router to an app, and pass that app"
    return f"not an ASGI app: {app!r}"


def _of_factory(app: Any, name: str) -> str:
    if _takes(app, 0):
        return ""
    if _takes(app, 3) or _takes(app, 2) or _is_asgi2(app):
        return f"{name} is an app, not a function that makes one: leave out factory=True (--factory)"
    return f"{name} takes arguments, and a factory is called without: pass functools.partial({name}, ...)"


def _of_class(app: type, name: str) -> str:
    own_call = type(app).__call__ is not type.__call__  # the metaclass's
    call = next((vars(each)["__call__"] for each in app.__mro__ if "__call__" in vars(each)), None)
    is_asgi2 = call is not None and _takes(app, 1) and _takes(call, 3) and not _is_wsgi(call)
    if own_call or hasattr(app, "__await__") or is_asgi2:
        return ""
    return f"{name} is a class, not an app: pass an instance, or add factory=True (--factory)"


def _of_parameters(app: Any, name: str) -> str:
    if _takes(app, 0, if_unknown=False):  # uvicorn calls it, to see whether it is a factory
        if not _is_async(app if inspect.isfunction(app) else type(app).__call__):
            return ""
        if _takes(app, 3):
            return f"{name} can be called without arguments, which uvicorn takes for a factory: give scope no default"
        call = f"await {app.__name__}()" if inspect.isfunction(app) else "the app that the coroutine returns"
        return f"{name} is a coroutine function, not an app: pass `{call}`, or make the app in a plain `def`"
    is_asgi3 = _is_async(app if inspect.isfunction(app) else getattr(app, "__call__", None))  # noqa: B004 (as uvicorn)
    if _takes(app, 3 if is_asgi3 else 1):
        return ""
    if not is_asgi3 and _takes(app, 2):
        return f"{name} is a WSGI app: pass a2wsgi.WSGIMiddleware(app), or interface='wsgi'"
    if not is_asgi3 and _takes(app, 3):
        return f"{name} is not an `async def` function, so that uvicorn takes it for ASGI 2: pass interface='asgi3'"
    return f"{name} is not an ASGI app, which takes the three arguments scope, receive and send"


def _is_asgi2(app: Any) -> bool:
    return _takes(app, 1) and "scope" in getattr(getattr(app, "__code__", None), "co_varnames", ("scope",))[:2]


def _is_wsgi(call: Any) -> bool:
    return inspect.isfunction(call) and "start_response" in call.__code__.co_varnames[: call.__code__.co_argcount]


def _is_fastapi_router(app: Any) -> bool:
    # FastAPI's routes need what the app around them sets up; Starlette's router is an app.
    router = getattr(sys.modules.get("fastapi.routing"), "APIRouter", None)
    return router is not None and isinstance(app, router) and type(app).__call__ is router.__call__


def _takes(function: Any, count: int, *, if_unknown: bool = True) -> bool:
    """Whether a function can be called with so many positional arguments."""
    try:
        signature = inspect.signature(function)
    except Exception:  # noqa: BLE001 (Python 3.14 evaluates annotations, which may name what only type checkers import)
        return if_unknown
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
