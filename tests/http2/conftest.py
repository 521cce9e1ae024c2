"""
What the tests of HTTP/2 share.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from aioserve import _limits


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which a warning is logged; a slow client in the same loop may keep a stop for some seconds."""
    monkeypatch.setattr(_limits, "SLOW_STOP", 5.0)
    caplog.set_level(logging.INFO)
    yield
    assert [each.getMessage() for each in caplog.get_records("call") if each.levelno >= logging.WARNING] == []
