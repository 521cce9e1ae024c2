"""
Clients in a process of their own: a loop that they share with the server could hide lost requests.

    python tests/helpers/load.py PORT CLIENTS fresh|kept-alive

Each client sends one request after the other until its standard input ends, on a new connection for each or on one that
it keeps alive, unless an answer says "connection: close". Then it prints one line of JSON: how many requests were
answered, how many failed without a byte of an answer, how many with a part of one, and how many took 3 seconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter

REQUEST = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n"
FRESH_REQUEST = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"

counts: Counter[str] = Counter(answered=0, unanswered=0, broken=0, stalled=0)


async def client(port: int, ended: asyncio.Event, *, keep_alive: bool) -> None:
    """Send one request after the other."""
    writer = None
    while not ended.is_set():
        began = time.monotonic()
        if writer is None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b""
        try:
            writer.write(REQUEST if keep_alive else FRESH_REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(5)
            counts["answered"] += 1
        except asyncio.IncompleteReadError as exc:
            counts["broken" if head or exc.partial else "unanswered"] += 1
            head = b"connection: close"
        except ConnectionError:
            counts["broken" if head else "unanswered"] += 1
            head = b"connection: close"
        counts["stalled"] += time.monotonic() - began > 3
        if b"connection: close" in head.lower():
            writer.transport.abort()
            writer = None
    if writer is not None:
        writer.transport.abort()


async def main(port: int, clients: int, kind: str) -> None:
    """Run the clients until the standard input ends."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client(port, ended, keep_alive=kind == "kept-alive"))
        await reader.read()
        ended.set()
    print(json.dumps(counts))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
