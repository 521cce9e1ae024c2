"""
Clients in a process of their own: a loop that they share with the server could hide lost requests.

    python tests/helpers/load.py ADDRESS CLIENTS fresh|kept-alive|blocking [CERTIFICATE]

The address is a port of 127.0.0.1 or the path of a Unix socket; with a certificate, the clients speak TLS. Each client
sends one request after the other until its standard input ends: on a new connection for each; on one that it keeps
alive, unless an answer says "connection: close"; or on a new one in a thread of its own, with a blocking socket. Where
nobody listens, it tries again.

Then it prints one line of JSON: how many requests were answered, how many connections were refused or ended before a
request was sent, how many requests failed without a byte of an answer, how many with a part of one, and how many took 3
seconds. A request that failed is counted apart if a busy machine has sent it too late for a server that stops.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from typing import Any

REQUEST = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n"
FRESH_REQUEST = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"

# How long a client waits before it tries again, in seconds.
PAUSE = 0.005

# How long a server that stops waits for the first request of a connection, in seconds.
FIRST_REQUEST = 0.25

# A connection or a request that takes longer is counted, in seconds.
LONG = 3

counts: Counter[str] = Counter(
    answered=0, refused=0, unsent=0, late=0, unanswered=0, broken=0, unconnected=0, stalled=0
)
ended = threading.Event()
context: ssl.SSLContext | None = None


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    tls: dict[str, Any] = {} if context is None else {"ssl": context, "server_hostname": "127.0.0.1"}
    if address.isdecimal():
        return await asyncio.open_connection("127.0.0.1", int(address), **tls)
    return await asyncio.open_unix_connection(address, **tls)


async def client(address: str, *, keep_alive: bool) -> None:
    """Send one request after the other."""
    writer = None
    while not ended.is_set():
        began = time.monotonic()
        is_new = writer is None
        if writer is None:
            try:
                reader, writer = await connect(address)
            except (ConnectionRefusedError, FileNotFoundError, BlockingIOError):
                counts["refused"] += 1
                await asyncio.sleep(PAUSE)
                continue
            except (OSError, EOFError):
                counts["unsent"] += 1
                await asyncio.sleep(PAUSE)
                continue
        connected = time.monotonic()
        counts["unconnected"] += connected - began > LONG
        head = b""
        try:
            writer.write(REQUEST if keep_alive else FRESH_REQUEST)
            is_late = is_new and time.monotonic() - began > FIRST_REQUEST
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(5)
            counts["answered"] += 1
        except asyncio.IncompleteReadError as exc:
            counts["broken" if head or exc.partial else "late" if is_late else "unanswered"] += 1
            head = b"connection: close"
        except OSError:
            counts["broken" if head else "late" if is_late else "unanswered"] += 1
            head = b"connection: close"
        counts["stalled"] += time.monotonic() - connected > LONG
        if b"connection: close" in head.lower():
            writer.transport.abort()
            writer = None
    if writer is not None:
        writer.transport.abort()


def blocking_client(address: str) -> None:
    """Send one request after the other, in a thread."""
    while not ended.is_set():
        began = connected = time.monotonic()
        received = b""
        failure = "unsent"
        with socket.socket(socket.AF_INET if address.isdecimal() else socket.AF_UNIX) as plain:
            try:
                plain.connect(("127.0.0.1", int(address)) if address.isdecimal() else address)
                connected = time.monotonic()
                with plain if context is None else context.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
                    sock.sendall(FRESH_REQUEST)
                    failure = "late" if time.monotonic() - began > FIRST_REQUEST else "unanswered"
                    while chunk := sock.recv(4096):
                        received += chunk
            except (ConnectionRefusedError, FileNotFoundError):
                counts["refused"] += 1
                time.sleep(PAUSE)
                continue
            except OSError:
                pass  # what has come tells
        if received.startswith(b"HTTP/1.1 200") and received.endswith(b"hello"):
            counts["answered"] += 1
        else:
            counts["broken" if received else failure] += 1
        counts["unconnected"] += connected - began > LONG
        counts["stalled"] += time.monotonic() - connected > LONG


async def main(address: str, clients: int, kind: str) -> None:
    """Run the clients until the standard input ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    blocking = clients if kind == "blocking" else 0
    threads = [threading.Thread(target=blocking_client, args=[address]) for _ in range(blocking)]
    for thread in threads:
        thread.start()
    async with asyncio.TaskGroup() as group:
        for _ in range(0 if threads else clients):
            group.create_task(client(address, keep_alive=kind == "kept-alive"))
        await reader.read()
        ended.set()
    for thread in threads:
        thread.join()
    print(json.dumps(counts))


if __name__ == "__main__":
    if len(sys.argv) > 4:
        context = ssl.create_default_context(cafile=sys.argv[4])
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
