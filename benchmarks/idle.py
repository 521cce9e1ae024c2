"""
What does a server cost that nobody asks anything?

Counted over some seconds, in a process for each, all at the same time:

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

from common import children, measuring

NAMES = ("bare", "aioserve", "aiohttp", "hypercorn", "h2corn", "granian", "uvicorn, task")
SECONDS = 2.0


def main(arguments: Any) -> int:
    """Return whether the servers of ours woke up."""
    report = measuring.Report(__file__, arguments)
    everybody = {name: children.serve(name, loop=arguments.loop) for name in NAMES}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for child in everybody.values():
        child.ask("start")
    time.sleep(0.5)
    for _ in range(arguments.rounds):
        for child in everybody.values():
            child.tell({"idle": SECONDS})
        for name, child in everybody.items():
            figures[name].append(child.answer())
    for child in everybody.values():
        child.ask("stop")
        child.__exit__(None, None, None)

    rows = {
        name: {
            "turns": statistics.median(each["turns"] for each in measured) / SECONDS,
            "switches": statistics.median(each["switches"] for each in measured) / SECONDS,
            "cpu, ms": statistics.median(each["cpu"] for each in measured) / SECONDS * 1000,
        }
        for name, measured in figures.items()
    }
    for row in rows.values():
        row["turns beyond bare"] = row["turns"] - rows["bare"]["turns"]
    report.table("idle, each second", rows)
    report.write()
    return int(rows["aioserve"]["turns beyond bare"])


if __name__ == "__main__":
    raise SystemExit(main(measuring.parser(__doc__, rounds=5).parse_args()))
