"""
How long a stop of the command line can take.
"""

from __future__ import annotations

from collections.abc import Sequence

from aioserve import _limits
from aioserve._process.command import command
from aioserve._settings import parse
from tests.helpers.apps import App


def longest_stop(arguments: Sequence[str]) -> float:
    """Return the longest time of a stop in seconds, for these arguments of "python -m aioserve"."""
    with command.make_context("aioserve", [*arguments]) as context:
        names = ("drain_delay", "shutdown_timeout")
        given = {name: context.params[name] for name in names if context.params[name] is not None}
    settings = parse(App(), given)
    assert settings.shutdown_timeout is not None
    return _limits.longest_stop(settings.drain_delay, settings.shutdown_timeout)
