"""
Is this version of aioserve slower than another one?

Both versions are measured in one run, each in processes of its own, one sample of one and one of the other in turn
(A B, B A, ...). A round starts new processes and asks all questions. The processes of both versions run on the same
core, another one in the next round, so that what else the machine does slows both. Every ratio is new / old: above 1,
this version is slower, or larger.

- start-stop, start-stop-uvloop: start and stop an idle server, the median of ten in a row, on asyncio and on uvloop
- many: start 1,000 servers in one loop, and stop them
- stop-1, stop-100, stop-5000: stop with so many idle connections, each of which has had an answer (they are
  freed after the stop, in both versions)
- stop-websocket: stop with an open WebSocket
- import: a new interpreter that imports `aioserve.serving` and ends; and the import alone, after uvicorn and anyio
- plugin: import `aioserve.pytest_plugin` after pytest, as every run of pytest does
- memory: of each of 1,000 servers
- requests: the time of a request (1 / requests per second), on 16 connections that are kept alive
- calls: the function calls of a request on a kept-alive connection; exact

Printed are the median of the ratios of all pairs, and the 95 % confidence interval of the median of the rounds' medians
(samples of the same processes are not independent). With fewer than 6 rounds, it is the interval of the pairs, which is
too narrow. "slower" means that the whole interval lies above the limit, "unclear" that the limit lies within it, "too
few" that more rounds are needed. The script exits with 1 if something is "slower".

Only the public API of aioserve is used, so that the other version can be any version.

    python benchmarks/versions.py --other ../old/src [--rounds 20] [--limit 1.03] [--json FILE] [QUESTION ...]
    python benchmarks/versions.py --other-python ../old/.venv/bin/python ...     an environment of its own

It needs the extra `bench`, also in the other environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import imports
import many_servers
import start_stop
import stop_with_clients
import throughput
from common import children, clients, measuring, peers

SRC = Path(__file__).parent.parent / "src"
SERVERS = 1000
REQUESTS = 1000
ENOUGH = 6
"""With fewer figures, no two of them are the ends of a 95 % interval."""

Figures = dict[str, float]
"""What one sample has measured: a figure for each row of the table."""


@contextlib.contextmanager
def on_core(number: int | None) -> Iterator[None]:
    """Run on one core only, with the processes that are started meanwhile, where the system can do that."""
    if number is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class Version:
    """One of the two, with processes that are kept for a round."""

    def __init__(self, interpreter: children.Interpreter, loop: str) -> None:
        self.interpreter = interpreter
        self.loop = loop
        self.core: int | None = None
        self.calls: dict[str, dict[str, int]] = {}
        self._started: dict[str, children.Child] = {}
        self._peer: stop_with_clients.Peer | None = None

    @classmethod
    def find(cls, python: str, src: Path | None, loop: str) -> Self:
        """Return the aioserve of this source folder, or the one that this Python has installed."""
        environment = dict(children.COMPILED)
        if src is not None:
            environment["PYTHONPATH"] = str(src.resolve())
        else:
            environment.pop("PYTHONPATH", None)
        return cls(children.Interpreter(python, environment), loop)

    def ask(self, question: str, loop: str | None = None) -> Any:
        """Let the process of this version that has such a loop measure itself; start it before the first question."""
        loop = loop or self.loop
        if loop not in self._started:
            with on_core(self.core):
                self._started[loop] = children.Child(__file__, "--child", loop, interpreter=self.interpreter)
        return self._started[loop].ask(question)

    @property
    def peer(self) -> stop_with_clients.Peer:
        """A server in a process of its own, whose clients are here."""
        if self._peer is None:
            with on_core(self.core):
                self._peer = stop_with_clients.Peer("aioserve", self.loop, self.interpreter, keep=True)
        return self._peer

    def end(self) -> None:
        """End the processes; the next round starts new ones."""
        for child in self._started.values():
            child.__exit__(None, None, None)
        self._started.clear()
        if self._peer is not None:
            self._peer.end()
            self._peer = None


def start_and_stop(loop: str | None, version: Version) -> Figures:
    return {f"start and stop{', uvloop' if loop == 'uvloop' else ''}, ms": version.ask("start-stop", loop) * 1e3}


def many(version: Version) -> Figures:
    starting, stopping = version.ask("many")
    return {f"start each of {SERVERS}, µs": starting * 1e6, f"stop each of {SERVERS}, µs": stopping * 1e6}


def stop(kind: str, count: int, version: Version) -> Figures:
    took = version.peer.measure(kind, count)
    if version.peer.ended or version.peer.left_open:
        raise RuntimeError(f"a server has not stopped, or has left connections open: {version.interpreter}")
    return {f"stop with {f'{count} idle' if kind == 'idle' else 'a WebSocket'}, ms": took * 1e3}


def import_serving(version: Version) -> Figures:
    with on_core(version.core):
        whole = asyncio.run(start_stop.cold("from aioserve import serving", version.interpreter)())
        beyond, _ = imports.imported("uvicorn, anyio -> serving", version.interpreter)
    return {"new interpreter, import, ms": whole * 1e3, "import beyond uvicorn, ms": beyond * 1e3}


def import_plugin(version: Version) -> Figures:
    with on_core(version.core):
        return {"import the plugin, ms": imports.imported("pytest -> plugin", version.interpreter)[0] * 1e3}


def memory(version: Version) -> Figures:
    weighed = many_servers.weigh_apart("aioserve", SERVERS, version.loop, version.interpreter)
    return {f"a server's memory, {kind}": figure for kind, figure in weighed.items()}


def request(version: Version) -> Figures:
    peer = version.peer
    kept_alive = clients.open_clients(peer.child.ask("start"), "idle", throughput.CONNECTIONS)
    with on_core(None if version.core is None else version.core + 1):
        rate = clients.ask_on(kept_alive, REQUESTS)
    peer.child.ask("stop")
    clients.hang_up(kept_alive)
    return {"a request, µs": 1e6 / rate}


def calls(version: Version) -> Figures:
    version.calls = version.ask("calls")
    return {f"{kind} calls of a request": float(sum(each.values())) for kind, each in version.calls.items()}


class Question(NamedTuple):
    """How to measure a sample of a version, and how many pairs of samples a round has."""

    measure: Callable[[Version], Figures]
    pairs: int
    warm_up: int = 0
    """How many samples of each to forget first."""
    every: int = 1
    """In which rounds only: 2 is each second one."""
    exact: bool = False
    """Whether one pair is enough."""


QUESTIONS = {
    "start-stop": Question(partial(start_and_stop, None), 50, 5),
    "start-stop-uvloop": Question(partial(start_and_stop, "uvloop"), 50, 5),
    "calls": Question(calls, 1, every=10, exact=True),
    "many": Question(many, 2, 1),
    "requests": Question(request, 20, 2),
    "stop-1": Question(partial(stop, "idle", 1), 10, 2),
    "stop-100": Question(partial(stop, "idle", 100), 6, 1),
    "stop-websocket": Question(partial(stop, "websocket", 1), 10, 2),
    "stop-5000": Question(partial(stop, "idle", 5000), 1, every=2),
    "import": Question(import_serving, 3),
    "plugin": Question(import_plugin, 4),
    "memory": Question(memory, 1, every=5, exact=True),
}

Pairs = list[tuple[float, float]]
"""What the new version had, and what the old one had next to it."""


def ask(question: Question, new: Version, old: Version, turn: int) -> dict[str, Pairs]:
    """Measure both in turn, the new one first if the turn is odd; return the pairs, for each row of the table."""
    for _ in range(question.warm_up):
        question.measure(new)
        question.measure(old)
    pairs: dict[str, Pairs] = {}
    for number in range(question.pairs):
        figures: dict[Version, Figures] = {}
        for version in (new, old) if (turn + number) % 2 else (old, new):
            figures[version] = question.measure(version)
        for row, figure in figures[new].items():
            pairs.setdefault(row, []).append((figure, figures[old][row]))
    return pairs


def summary(rounds: list[Pairs], limit: float, *, exact: bool) -> dict[str, Any]:
    """Return a row of the table."""
    ratios = [[new / old for new, old in pairs] for pairs in rounds]
    every = [ratio for each in ratios for ratio in each]
    independent = [statistics.median(each) for each in ratios] if len(rounds) >= ENOUGH else every
    low, high = measuring.interval(independent)
    if len(independent) < ENOUGH and not exact:
        verdict = "too few"
    elif low > limit:
        verdict = "slower"
    else:
        verdict = "unclear" if high > limit else "not slower"
    return {
        "new / old": statistics.median(every),
        "from": low,
        "to": high,
        "verdict": verdict,
        "new": statistics.median(new for pairs in rounds for new, _ in pairs),
        "old": statistics.median(old for pairs in rounds for _, old in pairs),
        "pairs": len(every),
    }


def main(arguments: Any) -> int:
    """Return whether something is slower."""
    report = measuring.Report(__file__, arguments)
    new = Version.find(sys.executable, SRC, arguments.loop)
    old = Version.find(arguments.other_python or sys.executable, arguments.other, arguments.loop)
    questions = {name: QUESTIONS[name] for name in arguments.questions or QUESTIONS}
    measured: dict[str, list[Pairs]] = {}
    exact: set[str] = set()
    try:
        print(f"new: {new.ask('where')}\nold: {old.ask('where')}", flush=True)
        new.end()
        old.end()
        for number in range(arguments.rounds):
            began = time.perf_counter()
            new.core = old.core = number
            for question in questions.values():
                if number % question.every == 0:
                    round_ = ask(question, new, old, turn=number // question.every)
                    for row, pairs in round_.items():
                        measured.setdefault(row, []).append(pairs)
                    exact |= round_.keys() if question.exact else set()
            new.end()  # the next round starts new processes
            old.end()
            print(f"round {number + 1}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    finally:
        new.end()
        old.end()

    rows = {row: summary(rounds, arguments.limit, exact=row in exact) for row, rounds in measured.items()}
    report.table(f"new / old; slower: above {arguments.limit}", rows)
    for kind, more in throughput.beyond(new.calls, old.calls).items():
        print(f"calls beyond the old version's, {kind}: {json.dumps(more)}")
    report.write()
    return int(any(row["verdict"] == "slower" for row in rows.values()))


async def be_a_version() -> None:
    """Measure, in a child, what it is asked."""
    import aioserve

    start = peers.aioserve()
    stopping: list[float] = []
    start_and_stop = start_stop.in_a_row(start_stop.cycle(start))
    many = many_servers.all_at(start, SERVERS, stopping)
    async for question in children.questions():
        if question == "start-stop":
            children.reply(await start_and_stop())
        elif question == "many":
            children.reply([await many(), stopping[-1]])
        elif question == "calls":
            children.reply(await throughput.count_calls(peers.aioserve, 200, kept_alive=True))
        else:
            children.reply(aioserve.__file__)


if __name__ == "__main__":
    parser = measuring.parser(__doc__, rounds=20)
    parser.add_argument("--other", type=Path, metavar="SRC", help="the source folder of the other version")
    parser.add_argument("--other-python", metavar="PYTHON", help="the Python of the environment of the other version")
    parser.add_argument("--limit", type=float, default=1.03, help="the highest ratio that is not slower; default: 1.03")
    parser.add_argument("--child", help="for its own use")
    parser.add_argument("questions", nargs="*", choices=QUESTIONS, metavar="QUESTION", help=", ".join(QUESTIONS))
    arguments = parser.parse_args()
    measuring.more_descriptors(12_000)
    if arguments.child:
        measuring.run(be_a_version(), arguments.child)
        sys.exit()
    if arguments.other is None and arguments.other_python is None:
        parser.error("name the other version: --other or --other-python")
    if arguments.other is not None and not (arguments.other / "aioserve").is_dir():
        parser.error(f"no aioserve in {arguments.other}")
    raise SystemExit(main(arguments))
