"""
Restarts under load from clients in another process. `benchmarks/restarts.py` and `tests/integration` do more of them.
"""

from __future__ import annotations

import pytest

from tests.helpers.processes import linux_only
from tests.helpers.restarting import restart_under_load, roll_under_load

RESTARTS = 10
CLIENTS = 20


@pytest.mark.parametrize(
    ("kind", "options"),
    [("fresh", {}), ("kept-alive", {"drain_delay": 0.2})],
    ids=["a connection for each request", "kept alive, with a drain"],
)
async def test_restarts_under_load_lose_no_request(kind: str, options: dict[str, float]) -> None:
    """
    Requests that have arrived are answered, others wait for the next server, and kept-alive clients see the stop in
    time.
    """
    counts = await restart_under_load(restarts=RESTARTS, clients=CLIENTS, kind=kind, **options)
    assert counts["answered"] >= 2 * CLIENTS * RESTARTS
    assert (counts["unanswered"], counts["broken"]) == (0, 0)


async def test_kept_alive_requests_that_cross_the_close_are_not_half_answered() -> None:
    """
    Without a drain, HTTP/1.1 cannot avoid that race; not a byte was answered, so the client can send the request again.
    """
    counts = await restart_under_load(restarts=RESTARTS, clients=CLIENTS, kind="kept-alive")
    assert counts["answered"] >= 2 * CLIENTS * RESTARTS
    assert counts["broken"] == 0


@linux_only
async def test_rolling_restarts_on_a_shared_port_lose_no_request() -> None:
    """Each new server takes its share of the connections when it has started; one that fails takes none."""
    counts = await roll_under_load(restarts=RESTARTS, clients=CLIENTS)
    assert counts["answered"] >= CLIENTS * RESTARTS
    assert (counts["unanswered"], counts["broken"], counts["stalled"]) == (0, 0, 0)
