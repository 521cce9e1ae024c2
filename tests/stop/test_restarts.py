"""
Restarts under load from clients in another process. `benchmarks/restarts.py` and `tests/integration` do more of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.helpers import not_portable
from tests.helpers.processes import linux_only
from tests.helpers.restarting import lost, restart_child_under_load, restart_under_load, roll_under_load

RESTARTS = 5
CLIENTS = 20


@pytest.mark.parametrize("kind", ["fresh", "blocking"])
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("where", [pytest.param("lent", marks=not_portable.lent_twice), "port", "path"])
async def test_restarts_under_load_lose_no_request(
    where: str, encrypted: bool, kind: str, tls_options: dict[str, Any], tmp_path: Path, authority: trustme.CA
) -> None:
    """Requests that have arrived are answered; others are refused, or wait for the next server on a lent socket."""
    certificate = str(tmp_path / "authority.pem")
    authority.cert_pem.write_to_path(certificate)
    options: dict[str, Any] = {"certificate": certificate, **tls_options} if encrypted else {}
    counts = await restart_under_load(restarts=RESTARTS, clients=CLIENTS, kind=kind, where=where, **options)
    assert counts["answered"] >= 2 * CLIENTS * RESTARTS
    assert not lost(counts)
    assert counts["refused"] == 0 or where != "lent"


@not_portable.child_processes
async def test_restarts_of_a_child_process_under_load_lose_no_request() -> None:
    counts = await restart_child_under_load(restarts=3, clients=CLIENTS, kind="blocking")
    assert counts["answered"] >= CLIENTS
    assert not lost(counts)


@not_portable.lent_twice
async def test_kept_alive_clients_see_a_stop_with_a_drain_in_time() -> None:
    counts = await restart_under_load(restarts=RESTARTS, clients=CLIENTS, kind="kept-alive", drain_delay=0.2)
    assert counts["answered"] >= 2 * CLIENTS * RESTARTS
    assert (counts["unanswered"], counts["broken"]) == (0, 0)


@not_portable.lent_twice
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
    assert counts["unconnected"] <= CLIENTS / 10  # whose SYN three servers in a row have dropped
    assert not lost(counts | {"unconnected": 0})
