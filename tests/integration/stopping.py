"""
How long a stop can take, of a server that the command line runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from aioserve import _options
from aioserve.__main__ import command
from aioserve._lifespan import Lifespan
from aioserve._shutdown import longest
from tests.apps import App


def longest_stop(arguments: Sequence[str]) -> float:
    """Return it in seconds, for what comes behind "python -m aioserve"."""
    with command.make_context("aioserve", [*arguments]) as context:
        names = ("drain_delay", "shutdown_timeout")
        given = {name: context.params[name] for name in names if context.params[name] is not None}
    settings = _options.parse(App, given)
    assert settings.shutdown_timeout is not None
    return longest(settings.drain_delay, settings.shutdown_timeout, Lifespan.grace)
