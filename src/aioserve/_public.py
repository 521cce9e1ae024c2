"""What a public class or function calls itself."""

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
