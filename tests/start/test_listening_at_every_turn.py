"""
The walk, for the moment in which the sockets begin to listen: clients, another server, and the file of a Unix socket.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aioserve import StartupError
from tests.helpers import not_portable
from tests.helpers import walk as walk_module
from tests.helpers.walk import WAYS, Interruption, Run, by_scope, natively, undisturbed, walk

pytestmark = [pytest.mark.usefixtures("short_grace"), pytest.mark.parametrize("way", WAYS)]

Record = Callable[[str, object], None]

REQUEST = b"GET / HTTP/1.1\r\nhost: app\r\nconnection: close\r\n\r\n"

# If one of more turns is tried, none of those may be among them in which the server listens.
FEW = 5


def bound_socket(port: int = 0) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


@pytest.fixture
def port() -> int:
    with bound_socket() as sock:
        number: int = sock.getsockname()[1]
        return number


async def test_client_that_connects_at_any_turn_is_refused_or_answered(
    way: str, port: int, record_property: Record
) -> None:
    """It is never accepted and then left without an answer: neither before the server is ready, nor at its end."""
    outcomes: list[str] = []

    async def visit(run: Run, turn: int) -> bool:
        client = socket.socket()

        def connect() -> None:
            try:
                client.connect(("127.0.0.1", port))  # the kernel answers
            except ConnectionRefusedError:
                outcomes.append("refused")
            else:
                outcomes.append("accepted")
                assert run.app.started
                client.sendall(REQUEST)

        with client:
            came = await undisturbed(run, turn, connect)
            if came and outcomes[-1] == "accepted":
                client.settimeout(5)
                received = b"".join(iter(partial(client.recv, 4096), b""))
                assert received.startswith(b"HTTP/1.1 200 ")
                assert received.endswith(b"hello")
        return came

    record_property("points", await walk(partial(Run, way, port=port), visit))
    # In that order: before the server listens, while it does, and after that.
    changes = [now for before, now in zip(["", *outcomes], outcomes, strict=False) if now != before]
    assert changes == ["refused", "accepted", "refused"][: len(changes)]
    assert "accepted" in changes or walk_module.every > FEW


async def test_another_server_can_begin_to_listen_at_any_turn(way: str, port: int, record_property: Record) -> None:
    """If it comes first, the start fails with an `OSError`, and the app is shut down in order."""
    failures: list[int | None] = []

    async def compete(run: Run, turn: int) -> bool:
        def listen() -> None:
            try:
                other.listen()
            except OSError as exc:
                failures.append(exc.errno)
            else:
                failures.append(None)

        def is_expected(error: BaseException) -> bool:
            return failures[-1] is None and isinstance(error, OSError) and error.errno == errno.EADDRINUSE

        with bound_socket(port) as other:
            return await undisturbed(run, turn, listen, is_expected)

    record_property("points", await walk(partial(Run, way, port=port), compete))
    assert set(failures) == {None, errno.EADDRINUSE} or walk_module.every > FEW


async def by_closing(run: Run, turn: int) -> bool:
    def act() -> None:
        if run.app.state is not None:
            run.app.state["aioserve"].close(timeout=0)

    return await undisturbed(run, turn, act, lambda error: isinstance(error, StartupError))


async def by_cancelling_its_own_task(run: Run, turn: int) -> bool:
    def act() -> None:
        for task in asyncio.all_tasks():
            if task.get_name().startswith("aioserve http"):
                task.cancel()

    return await undisturbed(run, turn, act, lambda error: isinstance(error, StartupError))


@pytest.mark.parametrize(
    "interrupt", [natively, by_scope, by_closing, by_cancelling_its_own_task], ids=lambda each: each.__name__
)
@pytest.mark.parametrize("kinds", ["uds", "port and uds"])
@not_portable.unix_sockets
async def test_start_at_a_unix_path_can_be_interrupted_at_every_turn(
    way: str, kinds: str, interrupt: Interruption, port: int, tmp_path: Path, record_property: Record
) -> None:
    """Nothing is left in its directory, or on the port."""
    beside: dict[str, Any] = {"port": port} if "port" in kinds else {}

    async def check(run: Run, turn: int) -> bool:
        came = await interrupt(run, turn)
        assert os.listdir(tmp_path) == []
        with bound_socket(port) as free:
            free.listen()
        return came

    record_property("points", await walk(partial(Run, way, uds=tmp_path / "app.sock", **beside), check))
