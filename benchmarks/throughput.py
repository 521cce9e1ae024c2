"""
Does a request cost more than on plain uvicorn?

Measured, aioserve against `uvicorn.Server` of the same configuration in a task, each in a process of its own, in many
short pairs whose order alternates, with new processes every few pairs (one process can be faster than the next for as
long as it lives):

- requests in a second, and how long 50 % and 99 % of them took at most: wrk, 16 connections that are kept alive; with
  HTTP/2, h2load, 4 connections with 4 streams each
- new connections in a second: one request each, 16 at a time, from this process (not with HTTP/2)

What counts is the ratio within a pair: the medians of these are printed, each with the 95 % confidence interval of the
median of what the processes had for theirs (the pairs of the same processes are not independent).

And, exact where clocks are noisy, the function calls of a request, on a kept-alive connection and, for comparison, on a
new one: as `sys.setprofile()` sees them in the loop's thread, the most frequent count of many requests, whose client is
another thread.

    python benchmarks/throughput.py [--rounds 40] [--http httptools] [--loop asyncio] [--json FILE]
"""

from __future__ import annotations

import asyncio
import collections
import functools
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from common import children, clients, measuring, peers

NAMES = ("aioserve", "uvicorn, task")
PAIRS_PER_PROCESS = 5
CONNECTIONS = 16
HTTP2 = "http2"
NEW_CONNECTIONS = 1000
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def wrk(port: int) -> dict[str, float]:
    """Let it run for a second, the shortest that it can."""
    command = ["wrk", "--latency", "-t1", f"-c{CONNECTIONS}", "-d1s", f"http://{peers.HOST}:{port}/"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(said)
    rate = re.search(r"Requests/sec: +([\d.]+)", said)
    assert rate is not None, said
    times = {share: float(time) * SECONDS[unit] for share, time, unit in re.findall(r"(\d+)% +([\d.]+)(\w+)", said)}
    return {"requests/s": float(rate[1]), "p50": times["50"], "p99": times["99"]}


def h2load(port: int) -> dict[str, float]:
    """Let it make fewer than 1,000 requests on each connection, after which aioserve closes it."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = ["h2load", "-n3600", "-c4", "-m4", f"--log-file={log}", f"http://{peers.HOST}:{port}/"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lines = [line.split("\t") for line in log.read_text().splitlines()]
    if any(status != "200" for _, status, _ in lines):
        raise RuntimeError(said)
    rate = re.search(r"([\d.]+) req/s", said)
    assert rate is not None, said
    times = sorted(int(took) / 1e6 for _, _, took in lines)
    return {"requests/s": float(rate[1]), "p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}


def pair(ports: dict[str, int], order: list[str], http: str) -> dict[str, dict[str, float]]:
    """Measure both."""
    if http == HTTP2:
        return {name: h2load(ports[name]) for name in order}
    results = {name: wrk(ports[name]) for name in order}
    for name in order:
        results[name]["new connections/s"] = clients.fetch(ports[name], NEW_CONNECTIONS)
    return results


def options(http: str) -> dict[str, Any]:
    """What both are given."""
    return {"http": "zttp", "http2": True} if http == HTTP2 else {"http": http}


def pairs(rounds: int, http: str, loop: str) -> list[dict[str, dict[str, float]]]:
    """Measure so many pairs."""
    results: list[dict[str, dict[str, float]]] = []
    while len(results) < rounds:
        servers = {name: children.serve(name, loop=loop, **options(http)) for name in NAMES}
        ports = {name: server.ask("start") for name, server in servers.items()}
        for port in ports.values():
            clients.fetch(port, 100)
        for _ in range(min(PAIRS_PER_PROCESS, rounds - len(results))):
            results.append(pair(ports, list(NAMES if len(results) % 2 else reversed(NAMES)), http))
        for server in servers.values():
            server.ask("stop")
            server.__exit__(None, None, None)
    return results


def of_processes(ratios: list[float]) -> list[list[float]]:
    """Put together what was measured on the same two processes."""
    return [ratios[first : first + PAIRS_PER_PROCESS] for first in range(0, len(ratios), PAIRS_PER_PROCESS)]


async def count_calls(make: Any, requests: int, *, kept_alive: bool, http2: bool = False) -> dict[str, dict[str, int]]:
    """Return the calls of a request, by name: of Python's functions, and of C's."""
    running = await make()()
    port = running.port()
    seen: list[tuple[str, str]] = []
    counted: list[list[tuple[str, str]]] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            seen.append(("Python", f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}"))
        elif event == "c_call":
            seen.append(("C", getattr(argument, "__qualname__", repr(argument))))

    def client() -> None:
        http2_connection = clients.Http2(port) if http2 else None
        connection = clients.connect(port) if http2_connection is None else http2_connection.socket
        for _ in range(requests):
            seen.clear()
            if http2_connection is not None:
                http2_connection.ask()
            elif kept_alive:
                clients.ask(connection, clients.GET)
            else:
                connection.close()
                connection = clients.connect(port)
                clients.ask(connection, clients.GET_ONCE)
            time.sleep(0.001)  # the loop finishes, and goes to sleep
            counted.append(list(seen))
        connection.close()

    thread = threading.Thread(target=client)
    done = asyncio.get_running_loop().create_future()
    thread.start()
    sys.setprofile(profile)
    asyncio.get_running_loop().call_later(0, functools.partial(_watch, thread, done))
    await done
    sys.setprofile(None)
    await running.stop()

    most_frequent = collections.Counter(len(each) for each in counted).most_common(1)[0][0]
    request = next(each for each in counted if len(each) == most_frequent)
    return {kind: dict(collections.Counter(name for of, name in request if of == kind)) for kind in ("Python", "C")}


def _watch(thread: threading.Thread, done: asyncio.Future[None]) -> None:
    # Seldom, so that hardly any request meets it.
    if thread.is_alive():
        asyncio.get_running_loop().call_later(0.1, functools.partial(_watch, thread, done))
    else:
        done.set_result(None)


async def calls(http: str, *, kept_alive: bool) -> dict[str, dict[str, dict[str, int]]]:
    """Count the calls of both."""
    makes = {
        "aioserve": partial(peers.aioserve, **options(http)),
        "uvicorn, task": partial(peers.uvicorn_task, **options(http)),
    }
    return {
        name: await count_calls(make, 200, kept_alive=kept_alive, http2=http == HTTP2) for name, make in makes.items()
    }


def main(arguments: Any) -> int:
    """Return how many Python calls a request has more than on uvicorn."""
    report = measuring.Report(__file__, arguments)
    said = subprocess.run(["wrk", "-v"], check=False, capture_output=True, text=True).stdout  # noqa: S607
    print(f"HTTP: {arguments.http}; {said.split('[')[0]}")

    measured = pairs(arguments.rounds, arguments.http, arguments.loop)
    rows = {}
    for what in measured[0]["aioserve"]:
        ratios = [each["aioserve"][what] / each["uvicorn, task"][what] for each in measured]
        low, high = measuring.interval([statistics.median(each) for each in of_processes(ratios)])
        scale = 1000 if what.startswith("p") else 1
        rows[what + (", ms" if scale > 1 else "")] = {
            "ratio": statistics.median(ratios),
            "from": low,
            "to": high,
            **{name: statistics.median(each[name][what] for each in measured) * scale for name in NAMES},
        }
    report.table(f"aioserve / uvicorn ({arguments.http})", rows)

    beyond = count(report, arguments, kept_alive=True)
    if arguments.http != HTTP2:
        count(report, arguments, kept_alive=False)
    report.write()
    # With HTTP/2, one counts the streams of a connection.
    return max(0, beyond - 1 if arguments.http == HTTP2 else beyond)


def beyond(ours: dict[str, dict[str, int]], theirs: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Return by how much the counts differ, and for which functions; without the kinds that do not differ."""
    more = {}
    for kind in ours:
        names = sorted({*ours[kind], *theirs[kind]})
        different = {name: ours[kind].get(name, 0) - theirs[kind].get(name, 0) for name in names}
        more[kind] = {name: number for name, number in different.items() if number}
    return {kind: different for kind, different in more.items() if different}


def count(report: measuring.Report, arguments: Any, *, kept_alive: bool) -> int:
    """Print the calls of both, and where they differ; return how many Python calls we make more."""
    counted = measuring.run(calls(arguments.http, kept_alive=kept_alive), arguments.loop)
    ours, theirs = counted["aioserve"], counted["uvicorn, task"]
    report.table(
        f"function calls of a request ({arguments.http}, {'kept alive' if kept_alive else 'a new connection'})",
        {name: {kind: sum(each[kind].values()) for kind in each} for name, each in counted.items()},
    )
    for kind, more in beyond(ours, theirs).items():
        print(f"beyond uvicorn's, {kind}: {json.dumps(more)}")
    return sum(ours["Python"].values()) - sum(theirs["Python"].values())


if __name__ == "__main__":
    parser = measuring.parser(__doc__, rounds=40)
    parser.add_argument(
        "--http", choices=["h11", "httptools", "zttp", HTTP2], default="httptools", help="default: httptools"
    )
    arguments = parser.parse_args()
    for program, package in {"wrk": "wrk", "h2load": "nghttp2-client"}.items():
        if shutil.which(program) is None:
            raise SystemExit(
                f"{program} is missing: apt-get install {package}, or brew install {package.split('-')[0]}"
            )
    raise SystemExit(main(arguments))
