"""
What the tests of `serving_process()` share: two ways to watch the child, and a check that none is left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from aioserve import _limits


@pytest.fixture(params=["by its descriptor", "by its pipe"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch the child as on Linux, and as on other platforms."""
    if request.param == "by its pipe":
        monkeypatch.delattr(os, "pidfd_open")


@pytest.fixture(autouse=True)
def children_are_gone() -> Iterator[None]:
    """Fail a test that leaves a child, also a dead one that was not waited for."""
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def short_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "CHILD_EXIT", 0.1)
