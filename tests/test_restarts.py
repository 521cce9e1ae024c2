"""
Restarts on a lent socket, under load from clients in another process. `benchmarks/restarts.py` does it at full size.
"""

from __future__ import annotations

import pytest

from tests.restarting import restart_under_load

RESTARTS = 10
CLIENTS = 20


@pytest.mark.parametrize(
    ("kind", "options"),
    [("fresh", {}), ("kept-alive", {"drain_delay": 0.2})],
    ids=["a connection for each request", "kept alive, with a drain"],
)
async def test_no_request_is_lost(kind: str, options: dict[str, float]) -> None:
    """What had arrived is answered, the rest waits for the next server, and who keeps alive is told to go in time."""
    counts = await restart_under_load(restarts=RESTARTS, clients=CLIENTS, kind=kind, **options)
    assert counts["answered"] >= 2 * CLIENTS * RESTARTS
    assert (counts["unanswered"], counts["broken"]) == (0, 0)


async def test_kept_alive_without_a_drain_only_http_1_1s_own_race_is_lost() -> None:
    """A request that crosses the close on its way; not a byte of it was answered, so it can be sent again."""
    counts = await restart_under_load(restarts=RESTARTS, clients=CLIENTS, kind="kept-alive")
    assert counts["answered"] >= 2 * CLIENTS * RESTARTS
    assert counts["broken"] == 0
