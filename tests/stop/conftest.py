"""
What the tests of the stop share.
"""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return a path for a Unix socket."""
    return str(tmp_path / "app.sock")
