"""
Measuring in turn, and saying what came out: ratios first, with the versions, and as JSON.

Of pyperf only its account of the machine is used. Its runner times one benchmark after the other, each in processes of
its own: what the machine does meanwhile would be in the ratios. Here everything that is compared takes turns within one
run, there and back (A B C, C B A, ...).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import platform
import resource
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pyperf
import uvloop

T = TypeVar("T")

PACKAGES = (
    *("aioserve-asgi", "uvicorn", "anyio", "uvloop", "httptools", "h11", "zttp", "websockets"),
    *("aiohttp", "hypercorn", "anycorn", "h2corn", "granian"),
)
UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6}


def parser(docstring: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser of what all scripts take."""
    result = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    result.add_argument("--rounds", type=int, default=rounds, help=f"how often to measure each; default: {rounds}")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    result.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio", help="default: asyncio")
    return result


def run(main: Coroutine[Any, Any, T], loop: str) -> T:
    """Run it on a loop of that kind."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop) as runner:
        return runner.run(main)


async def in_turn(
    ways: Mapping[str, Callable[[], Awaitable[float]]],
    rounds: int,
    *,
    every: Mapping[str, int] | None = None,
    warm_up: int = 3,
) -> dict[str, list[float]]:
    """
    Let each way measure itself, in turn, so often; return what it returned.

    Args:
        ways: What is compared.
        rounds: How often.
        every: In which rounds only, for those that take long: 11 is each eleventh one. Odd, so that they turn, too.
        warm_up: How many rounds to forget first; one, of those that take long.
    """
    figures: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    gc.collect()
    for number in range(-warm_up, rounds):
        for name in names if number % 2 else reversed(names):
            step = (every or {}).get(name, 1)
            due = number % step == 0 if number >= 0 else step == 1 or number == -1
            if not due:
                continue
            figure = await ways[name]()
            if number >= 0:
                figures[name].append(figure)
    return figures


def timed(way: Callable[[], Awaitable[object]]) -> Callable[[], Coroutine[Any, Any, float]]:
    """Make it return how long it took, in seconds."""

    async def timing() -> float:
        before = time.perf_counter()
        await way()
        return time.perf_counter() - before

    return timing


def interval(figures: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median, whatever the distribution: two of the figures, by the binomial."""
    ordered = sorted(figures)
    count = len(ordered)
    below = 0.0
    for rank in range(count // 2):
        below += math.comb(count, rank) / 2**count
        if below > 0.025:
            return ordered[max(rank - 1, 0)], ordered[min(count - rank, count - 1)]
    return ordered[0], ordered[-1]


class Report:
    """The figures of one script."""

    def __init__(self, script: str, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.script = Path(script).stem
        self.tables: dict[str, dict[str, dict[str, Any]]] = {}
        self.versions = {name: version(name) for name in PACKAGES}
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        print(f"Python {platform.python_version()}, {packages}")
        print(f"{platform.platform(terse=True)}; loop: {arguments.loop}; rounds: {arguments.rounds}")

    def times(
        self, question: str, figures: Mapping[str, Sequence[float]], *, to: str = "bare", unit: str = "ms"
    ) -> None:
        """Print the median of each as a ratio to that of one, then in its unit."""
        medians = {name: statistics.median(each) for name, each in figures.items() if each}
        rows: dict[str, dict[str, Any]] = {}
        print(f"\n{question}\n{'':24} {'x ' + to:>12}   {'median, ' + unit:>12}   {'best':>9}   {'95 % interval':>21}")
        for name, median in medians.items():
            scaled = [figure * UNITS[unit] for figure in figures[name]]
            low, high = interval(scaled)
            rows[name] = {
                "ratio": median / medians[to],
                "median": median * UNITS[unit],
                "best": min(scaled),
                "interval": [low, high],
                "unit": unit,
                "figures": scaled,
            }
            print(
                f"{name:24} {median / medians[to]:12.2f}   {median * UNITS[unit]:12.3f}   {min(scaled):9.3f}"
                f"   {low:9.3f} - {high:9.3f}",
                flush=True,
            )
        self.tables[question] = rows

    def table(self, question: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Print what is no time."""
        wide = max([24, *map(len, rows)])
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        print(f"\n{question}\n{'':{wide}} " + " ".join(f"{column:>14}" for column in columns))
        for name, row in rows.items():
            print(f"{name:{wide}} " + " ".join(f"{_brief(row.get(column)):>14}" for column in columns), flush=True)
        self.tables[question] = {name: dict(row) for name, row in rows.items()}

    def write(self) -> None:
        """Write the JSON, if it was asked for."""
        if self.arguments.json is None:
            return
        measured = pyperf.Run([1.0], collect_metadata=True).get_metadata()
        written = {
            "script": self.script,
            "loop": self.arguments.loop,
            "rounds": self.arguments.rounds,
            "versions": {"python": platform.python_version(), **self.versions},
            "metadata": {name: str(value) for name, value in measured.items()},
            "tables": self.tables,
        }
        self.arguments.json.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def more_descriptors(wanted: int) -> None:
    """Allow this process, and those that it starts, so many descriptors, or as many as it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
