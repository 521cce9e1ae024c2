"""Signatures and docstrings of the functions that serve, for editors and `help()`; errors where a block is misused."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from aioserve import _options
from aioserve._errors import public

Function = TypeVar("Function", bound=Callable[..., Any])


def with_options(described_by: Callable[..., Any] | None = None) -> Callable[[Function], Function]:
    """
    Decorate a public function with ``**options: Unpack[Options]``.

    Its `__signature__` has each option with its default. Where its docstring says "As in `serving()`." of `app` and
    `options`, it gets their descriptions from the function that describes them.
    """

    def decorate(function: Function) -> Function:
        function.__signature__ = OptionsSignature.of(function)  # type: ignore[attr-defined]
        if described_by is not None and described_by.__doc__ and function.__doc__:  # -OO leaves none
            arguments = described_by.__doc__.partition("Args:\n")[2].partition("\n\n")[0].strip()
            app, _, others = arguments.partition(" host: ")
            for name, text in (("app", app.rstrip()), ("options", f"host: {others}")):
                function.__doc__ = function.__doc__.replace(f"{name}: As in `serving()`.", text)
        return public(function)

    return decorate


def describe(function: Callable[..., Any], option: str) -> str:
    """Return the first sentence that a function's docstring says of an option; "" under ``-OO``."""
    arguments = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.search(rf"^    {option}: (.*?[.])(?=\s|$)", arguments, flags=re.MULTILINE | re.DOTALL)
    return " ".join(found[1].replace("`", "").split()) if found else ""


class OptionsSignature(inspect.Signature):
    """The signature of a function with options; made when somebody looks at it."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> OptionsSignature:
        signature = cls.__new__(cls)
        signature._function = function
        return signature

    def __getattr__(self, name: str) -> Any:
        # Called for an attribute that is missing: here, those that the base class sets.
        if name not in inspect.Signature.__slots__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        made = _signature_with_options(self._function)
        inspect.Signature.__init__(self, [*made.parameters.values()], return_annotation=made.return_annotation)
        return getattr(self, name)


class _Mode(int):
    def __repr__(self) -> str:
        return oct(self)


def _signature_with_options(function: Any) -> inspect.Signature:
    plain = types.FunctionType(function.__code__, {}, argdefs=function.__defaults__)  # without our `__signature__`
    plain.__kwdefaults__, plain.__annotations__ = function.__kwdefaults__, function.__annotations__
    signature = inspect.signature(plain)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    defaults = _options.uvicorn_defaults() | _options.DEFAULTS | {"uds_mode": _Mode(_options.DEFAULTS["uds_mode"])}
    options = [  # without those that the installed uvicorn lacks
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation in _options.Options.__annotations__.items()
        if (default := defaults.get(name, inspect.Parameter.empty)) is not inspect.Parameter.empty
    ]
    return signature.replace(parameters=[*own, *options])


_OTHER_WAYS = {
    "with serving(app)": "with start_in_thread(app) as server:",
    "await serving(app)": "server = await start(app)",
}


class AsyncBlock:
    """What a function returns whose block has to be an async one; it says so where it is used in another way."""

    _function: str
    _app: object

    def _refuse(self, word: str) -> NoReturn:
        call = f"{self._function}(app)"
        other = _OTHER_WAYS.get(f"{word} {call}")
        hint = f", or `{other}`" if other else ""
        raise TypeError(f"`{word} {call}` does not work; write `async with {call} as server:`{hint}")

    def __enter__(self) -> NoReturn:
        self._refuse("with")

    def __exit__(self, *_: object) -> None:
        pass  # Python looks for both before it calls one

    def __await__(self) -> NoReturn:
        self._refuse("await")

    def __repr__(self) -> str:
        from aioserve._uvicorn.apps import name_of  # only for those who look at it

        return f"<aioserve.{self._function}({name_of(self._app)})>"
