"""
The picture and the tables of the page on speed, from the JSON of the scripts.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

Results = Mapping[str, Any]
"""What the scripts have written, each under the name of its file."""

BEGIN, END = "<!-- figures: written by benchmarks/all.py -->", "<!-- end of the figures -->"

COLUMNS = (
    "bare",
    "sketch",
    "aioserve",
    "aiohttp",
    "aiohttp, new app",
    "hypercorn",
    "anycorn",
    "h2corn",
    "granian",
    "websockets",
    "uvicorn, task",
)
ROWS = [
    ("start and stop", "start_stop-asyncio", "start and stop"),
    ("the same on uvloop", "start_stop-uvloop", "start and stop"),
    ("first byte, from connecting", "first_byte-asyncio", "first byte, from connecting"),
    ("first byte, from nothing", "first_byte-asyncio", "first byte, from nothing"),
    ("stop with 1 idle connection", "stop_with_clients-asyncio", "stop with 1 idle"),
    ("stop with 100", "stop_with_clients-asyncio", "stop with 100 idle"),
    ("stop with 5,000", "stop_with_clients-asyncio", "stop with 5000 idle"),
    ("stop with a WebSocket", "stop_with_clients-asyncio", "stop with a WebSocket"),
    ("stop with an event stream", "stop_with_clients-asyncio", "stop with a stream"),
    ("stop with 100 connections of HTTP/2", "stop_with_clients-asyncio", "stop with 100 HTTP/2"),
    ("stop with 10,000 that have sent half a head", "stop_with_clients-asyncio", "stop with 10000 half heads"),
    ("start each of 1,000", "many_servers-asyncio", "start each of many"),
    ("stop each of 1,000", "many_servers-asyncio", "stop each of many"),
]


def read(folder: Path) -> dict[str, Any]:
    """Read what the scripts have written."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def machine(results: Results) -> str:
    """One sentence on what was measured, and where."""
    one = results["start_stop-asyncio"]
    names = {"aioserve-asgi": "", "python": "Python"}
    packages = ", ".join(
        f"{names.get(name, name)} {number}".strip()
        for name, number in one["versions"].items()
        if name != "aioserve-asgi"
    )
    metadata = one["metadata"]
    processor = metadata.get("cpu_model_name", metadata.get("platform", "?"))
    return f"{packages}; {metadata.get('cpu_count', '?')} processors, {processor}; {metadata['platform']}"


def time(milliseconds: float) -> str:
    """A time with two digits, in the unit that suits it."""
    if milliseconds < 1:
        return f"{_digits(milliseconds * 1000)} µs"
    return f"{_digits(milliseconds)} ms" if milliseconds < 1000 else f"{_digits(milliseconds / 1000)} s"


def _digits(number: float) -> str:
    if number == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(number))))
    return f"{round(number, 1 - math.floor(math.log10(abs(number)))):,.{digits}f}"


def tables(results: Results) -> str:
    """The tables, in Markdown."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for title, file, question in ROWS:
        row = results[file]["tables"].get(question)
        if row is None:
            continue
        ours = row["aioserve"]
        wrong = results[file]["tables"].get(f"went wrong in a {question.replace(' idle', '')}", {})
        cells = [_cell(name, row.get(name), ours, wrong.get(name, {})) for name in COLUMNS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    weights = results["many_servers-asyncio"]["tables"]["memory of each of many"]
    ours_weighs = weights["aioserve"]["traced, KiB"]
    cells = [
        f"**1** ({_digits(ours_weighs)} KiB)"
        if name == "aioserve"
        else (_digits(weights[name]["traced, KiB"] / ours_weighs) if name in weights else "")
        for name in COLUMNS
    ]
    lines.append("| memory of each of 1,000 | " + " | ".join(cells) + " |")

    lines += [
        "",
        "| aioserve / `uvicorn.Server` | requests/s | p50 | p99 | new connections/s | Python calls a request |",
    ]
    lines.append("| --- |" + " --- |" * 5)
    for file, result in results.items():
        if not file.startswith("throughput-"):
            continue
        _, http, loop = file.split("-")
        rates, calls, *_ = result["tables"].values()
        cells = [f"{row['ratio']:.2f} ({row['from']:.2f} to {row['to']:.2f})" for row in rates.values()]
        cells += [""] * (4 - len(cells))  # with HTTP/2, new connections are not counted
        cells.append(f"{calls['aioserve']['Python']} / {calls['uvicorn, task']['Python']}")
        lines.append(f"| {http}, {loop} | " + " | ".join(cells) + " |")

        said = sentences(results)
    lines += ["", *textwrap.wrap(said, 120), "", *textwrap.wrap(f"Measured with {machine(results)}.", 120)]
    return "\n".join(lines)


def sentences(results: Results) -> str:
    """What fits into no table."""
    idle = results["idle-asyncio"]["tables"]["idle, each second"]
    ours_wakes, theirs_wake = (
        idle[name]["switches"] - idle["bare"]["switches"] for name in ("aioserve", "uvicorn, task")
    )
    imports = results["imports"]["tables"]["import"]
    cycles, rows = next(iter(results["cycles-asyncio"]["tables"].items()))
    ours = rows["aioserve"]
    descriptors, threads, tasks = (ours[key].split() for key in ("descriptors", "threads", "tasks"))
    said = [
        f"An idle server wakes up {ours_wakes:.0f} times a second (uvicorn's: {theirs_wake:.0f}).",
        f"In {int(cycles.split()[-2]):,} cycles of start and stop, the program's descriptors go",
        f"from {descriptors[0]} to {descriptors[-1]}, its threads from {threads[0]} to {threads[-1]}, its tasks from",
        f"{tasks[0]} to {tasks[-1]}, and its memory grows by {ours['bytes a cycle']:.1f} bytes a cycle.",
        f"Importing takes {imports['uvicorn, anyio -> serving']['median']:.1f} ms beyond `import uvicorn, anyio`.",
    ]
    if "pytest -> plugin" in imports:
        said.append(f"Importing the pytest plugin takes {imports['pytest -> plugin']['median']:.1f} ms.")
    slow = results["idle-asyncio"]["tables"]["with clients that have sent half a head, each second"]
    cost = slow["aioserve"]["cpu, ms"]
    said.append(f"10,000 clients that have sent half a head cost it {cost:.1f} ms of processor time a second.")
    warm = results["start_stop-asyncio"]["tables"]["start and stop"]
    ours, popular = (warm[name]["median"] for name in ("aioserve, thread", "uvicorn, thread"))
    said.append(
        f"`start_in_thread()` and `stop()` take {time(ours)}, `uvicorn.Server.run()` in a thread {time(popular)}."
    )
    restarts = next(iter(results["restarts"]["tables"].values()))["overlapping"]
    said.append(
        f"When the next server takes half a second to start and listens on the same port (`reuse_port`), "
        f"no client waits longer than {time(restarts['longest'])}, and {restarts['unanswered'] + restarts['broken']} "
        f"of {restarts['answered']:,} requests are lost."
    )
    session = next(iter(results["fixtures"]["tables"].values()))
    ratios = [session[name]["ratio"] for name in ("aioserve", "aioserve, not raising")]
    said.append(
        f"1,000 tests with a real server each take {ratios[0]:.2f} times as long as with a fake transport, "
        f"and {ratios[1]:.2f} times with `raise_app_exceptions=False`."
    )
    return " ".join(said)


def _cell(name: str, row: Any, ours: Any, wrong: Mapping[str, int]) -> str:
    if row is None:
        return ""
    if wrong.get("ended"):
        return f"> {time(row['median'])}"
    if name == "aioserve":
        return f"**1** ({time(ours['median'] / (1000 if ours['unit'] == 'µs' else 1))})"
    return _digits(row["median"] / ours["median"]) + ("*" if wrong.get("left open") else "")


def put_into(page: Path, text: str) -> None:
    """Replace what stands there between the two marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


UNITS = {-2: "ns", -1: "µs", 0: "ms", 1: "s", 2: "ks"}

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .small { font-size: 11px; fill: #59636e }
  .ours text { font-weight: 600 }
  .grid { stroke: #d1d9e0 }
  .dot { fill: #8c959f }
  .ours .dot { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .small { fill: #9198a1 }
    .grid { stroke: #3d444d }
    .dot { fill: #656c76 }
    .ours .dot { fill: #4493f8 }
  }
"""


def picture(results: Results) -> str:
    """Draw how long starting and stopping takes, on a logarithmic scale, as SVG."""
    rows = results["start_stop-asyncio"]["tables"]["start and stop"]
    ordered = sorted(rows.items(), key=lambda item: item[1]["median"])
    medians = {name: row["median"] for name, row in ordered if name != "sketch"}
    left, right, top, height, step = 130, 560, 46, 16, 24
    width, bottom = 720, top + step * len(medians)
    low = math.floor(math.log10(min(medians.values())))
    high = math.ceil(math.log10(max(medians.values())))

    def x(milliseconds: float) -> float:
        return left + (right - left) * (math.log10(milliseconds) - low) / (high - low)

    title = "Start and stop of an idle server"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 44}" role="img" aria-label="{title}">',
        f"<style>{STYLE}</style>",
        f'<text x="{left}" y="20">{title}: the median (each line is ten times the last)</text>',
    ]
    for exponent in range(low, high + 1):
        at = x(10.0**exponent)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 6}" y2="{bottom}"/>')
        label = f"{10 ** (exponent % 3)} {UNITS[exponent // 3]}"
        parts.append(f'<text class="small" x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{label}</text>')
    for number, (name, median) in enumerate(medians.items()):
        y = top + step * number
        ratio = "the limit" if name == "bare" else f"{_digits(median / medians['bare'])} × bare"  # noqa: RUF001 (in a picture, it is what it looks like)
        shown = "bare asyncio" if name == "bare" else name
        parts.append(
            f'<g class="{"ours" if name == "aioserve" else "peer"}">'
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(shown)}</text>'
            f'<circle class="dot" cx="{x(median):.1f}" cy="{y + height / 2}" r="6"/>'
            f'<text x="{x(median) + 11:.1f}" y="{y + 12}">{time(median)} · {ratio}</text></g>'
        )
    versions = results["start_stop-asyncio"]["versions"]
    shown = ("python", "uvicorn", "aiohttp", "hypercorn", "anycorn", "h2corn", "granian")
    said = ", ".join(f"{name} {versions[name]}" for name in shown)
    parts.append(f'<text class="small" x="{left}" y="{bottom + 34}">{escape(said)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
