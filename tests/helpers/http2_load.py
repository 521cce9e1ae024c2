"""
A client of HTTP/2 in a process of its own, which has many streams in flight.

    python -m tests.helpers.http2_load PORT STREAMS waves|steady [CERTIFICATE]

It keeps one connection until that gets a GOAWAY, and then opens another one for the streams above its last, and for
all that follow. In waves, it waits for all its streams before it opens the next ones; steadily, it opens the next one
with each answer. It ends with its standard input.

Then it prints one line of JSON: how many streams were answered, and how many with another status than 200; how many
were above a GOAWAY's last stream, and how many of those had a part of an answer; how many were lost, with a connection
that a busy machine has made too late for a server that stops counted apart; how many connections were reset.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time
from collections import Counter
from typing import Any

from tests.helpers.http2 import Frames
from tests.helpers.load import FIRST_REQUEST, PAUSE

NAMES = ("answered", "other", "above", "contradicted", "lost", "late", "reset", "connections")
counts: Counter[str] = Counter(dict.fromkeys(NAMES, 0))
has_ended = False


async def use_connection(port: int, streams: int, tls: dict[str, Any], *, steady: bool) -> None:
    """Open streams on one connection, until it is told to close."""
    began = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, **tls)
    except (ConnectionError, EOFError):
        await asyncio.sleep(PAUSE)
        return
    frames = Frames()
    frames.h2.initiate_connection()
    counts["connections"] += 1
    is_late = False
    try:
        while True:
            is_open = not (frames.goaways or has_ended)
            unanswered = sum(not each.is_over for each in frames.answers.values())
            if is_open and (steady or not unanswered):
                is_late = is_late or (not frames.answers and time.monotonic() - began > FIRST_REQUEST)
                for _ in range(streams - unanswered):
                    frames.request()
            writer.write(frames.h2.data_to_send())
            if not (is_open or unanswered) and not frames.goaways:
                break  # it is the client that ends
            data = await reader.read(65536)
            if not data:
                break
            frames.receive(data)
    except ConnectionError:
        counts["reset"] += 1
    writer.transport.abort()
    last = frames.goaways[-1][0] if frames.goaways else 0
    for stream, answer in frames.answers.items():
        if answer.is_complete and (stream <= last or not frames.goaways):
            counts["answered" if answer.status == 200 and answer.body == b"hello" else "other"] += 1
        elif frames.goaways and stream > last:
            counts["above" if answer.status is None else "contradicted"] += 1
        else:
            counts["late" if is_late else "lost"] += 1
            print("lost", stream, answer.status, frames.goaways, file=sys.stderr)


async def main(port: int, streams: int, tls: dict[str, Any], *, steady: bool) -> None:
    """Run until the standard input ends."""
    global has_ended
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def use_connections() -> None:
        while not has_ended:
            await use_connection(port, streams, tls, steady=steady)

    using = asyncio.create_task(use_connections())
    await reader.read()
    has_ended = True
    await using
    print(json.dumps(counts))


if __name__ == "__main__":
    tls_options: dict[str, Any] = {}
    if len(sys.argv) > 4:
        context = ssl.create_default_context(cafile=sys.argv[4])
        context.set_alpn_protocols(["h2"])
        tls_options = {"ssl": context, "server_hostname": "127.0.0.1"}
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), tls_options, steady=sys.argv[3] == "steady"))
