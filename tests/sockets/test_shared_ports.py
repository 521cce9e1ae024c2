"""
`reuse_port`: several servers share a port.
"""

from __future__ import annotations

import socket
from typing import Any

import pytest

from aioserve import Server, serving, start
from tests.helpers.apps import App
from tests.helpers.clients import get


async def until_both_have_served(first: Server, second: Server) -> None:
    """The kernel gives each connection to one of them, by its addresses."""
    for _ in range(200):
        assert (await get(first)).text == "hello"
        if first.stats.served and second.stats.served:
            return
    raise AssertionError((first.stats, second.stats))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", None], ids=str)
async def test_two_servers_can_share_a_port(host: str | None) -> None:
    """Each gets a part of the connections; when one has closed, the other gets all."""
    async with serving(App(), host=host, reuse_port=True) as first:
        port: Any = first.port
        async with serving(App(), host=host, port=port, reuse_port=True) as second:
            assert second.port == port
            await until_both_have_served(first, second)
        assert (await get(first)).text == "hello"


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (False, False)])
async def test_both_servers_must_set_reuse_port(first: bool, second: bool) -> None:
    """Otherwise the port is busy."""
    async with serving(App(), reuse_port=first) as server:
        port: Any = server.port
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await start(App(), port=port, reuse_port=second)


async def test_reuse_port_is_refused_where_it_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every platform has `SO_REUSEPORT`."""
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(ValueError, match="reuse_port is not supported on this platform"):
        await start(App(), reuse_port=True)
