"""
What does a server cost that nobody asks anything?

Counted over some seconds, in a process for each, all at the same time, without a client; and then one server after the
other, with 10,000 clients that have sent half the head of a request (1,000 if there are fewer than 5 rounds):

- turns: how often the loop goes to sleep and wakes up (asyncio's loop only); one is the timer of the measuring
- switches: how often a thread of the process goes to sleep
- cpu: the processor's time

Bare is asyncio's own server. All figures are for a second.

    python benchmarks/idle.py [--rounds 5] [--loop asyncio] [--json FILE]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from common import children, clients, measuring

NAMES = ("bare", "aioserve", "aiohttp", "hypercorn", "anycorn", "h2corn", "granian", "uvicorn, task")
SECONDS = 2.0
QUICK_SECONDS = 0.5  # with fewer than 5 rounds


def summary(measured: list[dict[str, float]], seconds: float) -> dict[str, float]:
    """The medians, for a second."""
    units = {"turns": 1, "switches": 1, "cpu": 1000}
    return {
        f"{name}, ms" if unit > 1 else name: statistics.median(each[name] for each in measured) / seconds * unit
        for name, unit in units.items()
    }


def with_slow_clients(name: str, loop: str, count: int, rounds: int, seconds: float) -> list[dict[str, float]]:
    """Count, while so many clients do not send the other half."""
    with children.serve(name, loop=loop) as child:
        opened = clients.open_clients(child.ask("start"), "half", count)
        try:
            time.sleep(1)
            return [child.ask({"idle": seconds}) for _ in range(rounds)]
        finally:
            clients.hang_up(opened)


def main(arguments: Any) -> int:
    """Return whether the servers of ours woke up."""
    report = measuring.Report(__file__, arguments)
    quick = arguments.rounds < 5
    seconds = QUICK_SECONDS if quick else SECONDS
    everybody = {name: children.serve(name, loop=arguments.loop) for name in NAMES}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for child in everybody.values():
        child.ask("start")
    time.sleep(0.5)
    for _ in range(arguments.rounds):
        for child in everybody.values():
            child.tell({"idle": seconds})
        for name, child in everybody.items():
            figures[name].append(child.answer())
    for child in everybody.values():
        child.ask("stop")
        child.__exit__(None, None, None)

    rows = {name: summary(measured, seconds) for name, measured in figures.items()}
    for row in rows.values():
        row["turns beyond bare"] = row["turns"] - rows["bare"]["turns"]
    report.table("idle, each second", rows)
    count = 1000 if quick else 10_000
    slow = {
        name: summary(with_slow_clients(name, arguments.loop, count, arguments.rounds, seconds), seconds)
        for name in NAMES
    }
    report.table("with clients that have sent half a head, each second", slow)
    report.write()
    return int(rows["aioserve"]["turns beyond bare"])


if __name__ == "__main__":
    measuring.more_descriptors(20_000)
    raise SystemExit(main(measuring.parser(__doc__, rounds=5).parse_args()))
