"""
Which acceptor a loop needs.
"""

from __future__ import annotations

import asyncio
import socket

from aioserve._net.acceptor import Acceptor, acceptors


async def choose_acceptor() -> type[Acceptor]:
    """
    Return what accepts connections in the running loop: tried once for each class of loops.

    A `RuntimeError` says what the loop lacks. (Some loops have a method, and raise in it.)
    """
    kind = type(asyncio.get_running_loop())
    if kind not in acceptors:
        try:
            await _try_readers()
            acceptors[kind] = Acceptor
        except NotImplementedError:
            from aioserve._net.portable import PortableAcceptor  # only where it is needed

            try:
                await _try_servers()
            except NotImplementedError:
                raise RuntimeError(
                    "aioserve needs an event loop with add_reader() and connect_accepted_socket(), or with "
                    f"create_server(), and {kind.__module__}.{kind.__qualname__} has neither"
                ) from None
            acceptors[kind] = PortableAcceptor
    return acceptors[kind]


async def _try_readers() -> None:
    loop = asyncio.get_running_loop()
    accepted, client = socket.socketpair()
    with client:
        accepted.setblocking(False)
        try:
            loop.add_reader(accepted.fileno(), lambda: None)
            loop.remove_reader(accepted.fileno())
            transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, accepted)
        except BaseException:
            accepted.close()
            raise
        transport.close()
        await asyncio.sleep(0)


async def _try_servers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, sock=sock)
        server.close()
        await server.wait_closed()
