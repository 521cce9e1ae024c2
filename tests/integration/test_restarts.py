"""
Two hundred rolling restarts on a shared port, under load from clients in another process.
"""

from __future__ import annotations

import pytest

from tests.helpers.restarting import roll_under_load


@pytest.mark.timeout(300)  # it takes a while on a busy machine
async def test_two_hundred_rolling_restarts_lose_no_request() -> None:
    """Each new server has a slow startup, and every fifth one fails."""
    counts = await roll_under_load(restarts=200, clients=20)
    assert counts["answered"] >= 200 * 20
    assert (counts["unanswered"], counts["broken"], counts["stalled"]) == (0, 0, 0)
