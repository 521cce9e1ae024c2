"""
How long does it take to stop a server that has clients?

Timed, in turn, each server in a process of its own and the clients in this one:

- 1, 100 and 5,000 idle connections (1,000 if there are fewer than 10 rounds), each of which has had an answer and is
  kept alive
- 100 idle connections of HTTP/2, in clear text
- 10,000 connections that have sent half the head of a request, the last of them a moment ago (1,000 if there are fewer
  than 10 rounds)
- a WebSocket that is open, whose client answers a close with a close
- a stream that is open (server-sent events without an end), whose client accepts such, and whose app waits for the
  disconnect

The servers: a bare protocol of asyncio's which closes its transports (not with a WebSocket or a stream), aioserve,
aiohttp whose app ends its streams and WebSockets in `on_shutdown`, hypercorn, anycorn, h2corn, granian, websockets
(WebSockets only), and uvicorn in a task. Each gives its clients 3 seconds, if it has an option for it; one that takes
those is measured once, and one that has not stopped half a second later is ended: "ended". "left open" are connections
that half a second after the stop are not closed.

    python benchmarks/stop_with_clients.py [--rounds 20] [--loop asyncio] [--json FILE]
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

from common import children, clients, measuring, peers

NAMES = ("bare", "aioserve", "aiohttp", "hypercorn", "anycorn", "h2corn", "granian", "websockets", "uvicorn, task")
ONLY = {
    "websocket": set(NAMES) - {"bare"},
    "stream": set(NAMES) - {"bare", "websockets"},
    "http2": {"aioserve", "hypercorn", "anycorn", "h2corn", "uvicorn, task"},
    "idle": set(NAMES) - {"websockets"},
    "half": set(NAMES) - {"websockets"},
}
HTTP2: dict[str, dict[str, Any]] = {
    "aioserve": {"http2": True, "http": "zttp"},
    "uvicorn, task": {"http2": True, "http": "zttp"},
}
LIMIT = peers.GRACE + 0.5


class Peer:
    """One of the servers, whose process is replaced when it had to be ended."""

    def __init__(self, name: str, loop: str, interpreter: children.Interpreter = children.THIS, **options: Any) -> None:
        self.name = name
        self.options = options
        self.loop = loop
        self.interpreter = interpreter
        self.child = self.serve()
        self.figures: list[float] = []
        self.left_open = 0
        self.ended = False

    def serve(self) -> children.Child:
        """Start its process."""
        return children.serve(self.name, loop=self.loop, interpreter=self.interpreter, **self.options)

    def measure(self, kind: str, count: int) -> float:
        """Start, connect, stop; return how long that took."""
        opened = clients.open_clients(self.child.ask("start"), kind, count)
        try:
            time.sleep(0.02)  # so that the server is done with the answers
            closing = threading.Thread(target=clients.close_as_told, args=[opened[0], LIMIT])
            if kind == "websocket":
                closing.start()
            took: float = self.child.ask("stop", LIMIT)
            if kind == "websocket":
                closing.join(0.5)
                self.left_open = max(self.left_open, int(closing.is_alive()))
            else:
                self.left_open = max(self.left_open, clients.still_open(opened))
        except children.TooLongError:
            self.end()
            self.child = self.serve()
            self.ended = True
            took = LIMIT
        finally:
            clients.hang_up(opened)
        return took

    def end(self) -> None:
        """End its process."""
        self.child.process.kill()
        self.child.process.communicate()


def ask(kind: str, count: int, everybody: list[Peer], rounds: int) -> dict[str, list[float]]:
    """Measure all in turn, and those that are slow once."""
    for peer in everybody:
        peer.figures, peer.left_open, peer.ended = [], 0, False
    for number in range(rounds):
        for peer in everybody if number % 2 else reversed(everybody):
            if peer.name not in ONLY[kind]:
                continue
            if not peer.figures or statistics.median(peer.figures) < 1:
                peer.figures.append(peer.measure(kind, count))
    return {peer.name: peer.figures for peer in everybody}


def main(arguments: Any) -> None:
    """Ask all questions."""
    report = measuring.Report(__file__, arguments)
    everybody = [Peer(name, arguments.loop) for name in NAMES]
    http2 = [Peer(name, arguments.loop, **HTTP2.get(name, {})) for name in NAMES if name in ONLY["http2"]]
    many = 5000 if arguments.rounds >= 10 else 1000
    questions = {f"{count} idle": ("idle", count) for count in (1, 100, many)}
    questions.update({"a WebSocket": ("websocket", 1), "a stream": ("stream", 1), "100 HTTP/2": ("http2", 100)})
    questions[f"{2 * many} half heads"] = ("half", 2 * many)
    try:
        for question, (kind, count) in questions.items():
            rounds = arguments.rounds if count < 1000 else max(1, arguments.rounds // 5)
            figures = ask(kind, count, http2 if kind == "http2" else everybody, rounds)
            report.times(f"stop with {question}", figures, to="aioserve")
            wrong = {
                peer.name: {"left open": peer.left_open, "ended": int(peer.ended)}
                for peer in (http2 if kind == "http2" else everybody)
                if peer.left_open or peer.ended
            }
            if wrong:
                report.table(f"went wrong in a stop with {question}", wrong)
    finally:
        for peer in [*everybody, *http2]:
            peer.end()
    report.write()


if __name__ == "__main__":
    measuring.more_descriptors(20_000)
    main(measuring.parser(__doc__, rounds=20).parse_args())
