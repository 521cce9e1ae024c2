"""
Two hundred restarts under load from clients in another process.
"""

from __future__ import annotations

import pytest

from tests.helpers.restarting import lost, restart_under_load, roll_under_load

RESTARTS = 200
CLIENTS = 20

pytestmark = [
    pytest.mark.timeout(300),  # they take a while on a busy machine
    pytest.mark.parametrize("kind", ["fresh", "blocking"]),
]


@pytest.mark.parametrize("where", ["lent", "port", "path"])
async def test_two_hundred_restarts_lose_no_request(where: str, kind: str) -> None:
    counts = await restart_under_load(restarts=RESTARTS, clients=CLIENTS, kind=kind, where=where)
    assert counts["answered"] >= 2 * RESTARTS * CLIENTS
    assert not lost(counts)


async def test_two_hundred_rolling_restarts_lose_no_request(kind: str) -> None:
    """They share a port. Each new server has a slow startup, and every fifth one fails."""
    counts = await roll_under_load(restarts=RESTARTS, clients=CLIENTS, kind=kind)
    assert counts["answered"] >= RESTARTS * CLIENTS
    assert counts["unconnected"] <= CLIENTS / 10  # whose SYN three servers in a row have dropped
    assert not lost(counts | {"unconnected": 0})
