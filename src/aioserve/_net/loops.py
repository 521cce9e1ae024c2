"""Which acceptor a loop needs."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from ssl import PROTOCOL_TLS_SERVER, SSLContext
from typing import Any

from aioserve import _limits
from aioserve._net import forks
from aioserve._net.acceptor import Acceptor, acceptors
from aioserve._net.handshakes import after_first_step
from aioserve._waiting import complete

_MISSING = (NotImplementedError, AttributeError)  # some loops and transports have a method, and raise in it


async def choose_acceptor(*, tls: bool = False) -> type[Acceptor]:
    """
    Return what accepts connections in the running loop: tried once for each class of loops, and once more for TLS.

    A `RuntimeError` says what the loop lacks.
    """
    kind = type(asyncio.get_running_loop())
    if (kind, tls) not in acceptors:
        # In a task, which is not cancelled in the middle: asyncio fails to make a connection whose server is closed.
        trying = asyncio.get_running_loop().create_task(_try_both(f"{kind.__module__}.{kind.__qualname__}", tls))
        acceptor = await complete(trying)
        acceptors[kind, tls] = acceptor
    return acceptors[kind, tls]


async def _try_both(loop_name: str, tls: bool) -> type[Acceptor]:
    try:
        try:
            with_tls = await _try_readers(tls)
            acceptor = Acceptor
        except _MISSING:
            from aioserve._net.portable import PortableAcceptor  # only where it is needed

            with_tls = await _try_server(tls)
            acceptor = PortableAcceptor
    except (*_MISSING, TimeoutError):
        raise RuntimeError(
            "aioserve needs an event loop with add_reader() and connect_accepted_socket(), or with create_server(), "
            f"and with set_protocol() in its transports; {loop_name} has not"
        ) from None
    if tls and not with_tls:
        raise RuntimeError(f"a server with TLS needs an event loop with start_tls(), and {loop_name} has none")
    return acceptor


async def _try_readers(tls: bool) -> bool:
    """Try what `Acceptor` needs, and return whether TLS works as well, if it is asked for."""
    loop = asyncio.get_running_loop()
    with forks.lock:
        accepted, client = socket.socketpair()
        for each in (accepted, client):
            forks.track(each)
    with client:
        accepted.setblocking(False)
        try:
            loop.add_reader(accepted.fileno(), lambda: None)
            loop.remove_reader(accepted.fileno())
            transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, accepted)
        except BaseException:
            accepted.close()
            raise
        return await _try_transport(transport, client, tls)


async def _try_server(tls: bool) -> bool:
    """Try what `PortableAcceptor` needs, and return whether TLS works as well, if it is asked for."""
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[Any] = loop.create_future()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
        server = await loop.create_server(lambda: _Accepted(accepted), sock=sock)
        try:
            with socket.create_connection(address) as client:
                transport = await asyncio.wait_for(accepted, _limits.TRIED_ACCEPT)
                return await _try_transport(transport, client, tls)
        finally:
            server.close()


class _Accepted(asyncio.Protocol):
    def __init__(self, accepted: asyncio.Future[Any]) -> None:
        self._accepted = accepted

    def connection_made(self, transport: Any) -> None:
        self._accepted.set_result(transport)


async def _try_transport(transport: Any, client: socket.socket, tls: bool) -> bool:
    loop = asyncio.get_running_loop()
    protocol = asyncio.Protocol()
    try:
        transport.set_protocol(protocol)
        if not tls:
            return False
        try:
            starting = loop.start_tls(transport, protocol, SSLContext(PROTOCOL_TLS_SERVER), server_side=True)
            with suppress(OSError):  # the client goes in the middle of the handshake
                await after_first_step(starting, client.close)
        except _MISSING:
            return False
        return True
    finally:
        transport.abort()
