"""
Does anything stay behind after 10,000 starts and stops?

Counted at the beginning (after a warm-up), in the middle and at the end of as many cycles, in a process for each peer;
every tenth server (but for bare, whose few lines keep each connection) answers a request:

- memory: as tracemalloc sees it after a collection, and RSS (in a second process, without tracemalloc)
- descriptors, threads, and asyncio's tasks

A peer is flat if it has no more descriptors, threads and tasks at the end than at the beginning, and its traced memory
grows by less than 32 bytes a cycle in the second half, or by less than 8 KiB in all of it, if the cycles are few.

    python benchmarks/cycles.py [--rounds 100] [--loop asyncio] [--json FILE]     a round is 100 cycles
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import subprocess
import sys
import tracemalloc
from typing import Any

import psutil

from common import children, clients, measuring, peers

NAMES = ("bare", "aioserve", "aiohttp", "hypercorn", "h2corn", "granian")
PER_ROUND = 100
WARM_UP = 200
FLAT = 32
NOISE = 8192  # bytes; what caches and counters take in a few cycles


async def ask(port: int) -> None:
    """Ask once, from the same loop."""
    loop = asyncio.get_running_loop()
    for _ in range(1000):
        with socket.socket() as client:
            client.setblocking(False)
            try:
                await loop.sock_connect(client, (peers.HOST, port))
            except ConnectionRefusedError:
                await asyncio.sleep(0.001)  # it does not accept yet, though it said that it has started
                continue
            await loop.sock_sendall(client, clients.GET_ONCE)
            while await loop.sock_recv(client, 65536):
                pass
            return


async def count(name: str, cycles: int) -> list[dict[str, int]]:
    """Return what there is at the beginning, in the middle and at the end."""
    start = peers.PEERS[name]()
    process = psutil.Process()
    counted = []
    for number in range(-WARM_UP, cycles + 1):
        if number in (0, cycles // 2, cycles):
            gc.collect()
            counted.append(
                {
                    "traced": tracemalloc.get_traced_memory()[0],
                    "rss": process.memory_info().rss,
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                    "tasks": len(asyncio.all_tasks()),
                }
            )
        running = await start()
        if number % 10 == 0 and name != "bare":
            await ask(running.port())
        await running.stop()
    return counted


def count_apart(name: str, arguments: Any, kind: str) -> list[dict[str, int]]:
    """Count in another process."""
    command = [sys.executable, __file__, "--rounds", str(arguments.rounds), "--loop", arguments.loop]
    done = subprocess.run([*command, "--count", name, kind], check=True, capture_output=True, text=True)
    counted: list[dict[str, int]] = json.loads(done.stdout)
    return counted


def main(arguments: Any) -> int:
    """Return whether something of ours stays."""
    report = measuring.Report(__file__, arguments)
    cycles = arguments.rounds * PER_ROUND
    rows: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        try:
            plain, traced = count_apart(name, arguments, "plain"), count_apart(name, arguments, "traced")
        except subprocess.CalledProcessError:
            rows[name] = {"flat": "no: it failed"}  # for want of descriptors, say
            continue
        grown = (traced[-1]["traced"] - traced[1]["traced"]) / (cycles / 2)
        whole = {key: [each[key] for each in plain] for key in ("descriptors", "threads", "tasks")}
        limit = max(FLAT, NOISE / (cycles // 2))
        flat = grown < limit and all(numbers[-1] <= numbers[0] for numbers in whole.values())
        rows[name] = {
            "flat": "yes" if flat else "no",
            "bytes a cycle": grown,
            "traced, KiB": " ".join(f"{each['traced'] // 1024}" for each in traced),
            "RSS, MiB": " ".join(f"{each['rss'] / 2**20:.1f}" for each in plain),
            **{key: " ".join(map(str, numbers)) for key, numbers in whole.items()},
        }
    report.table(f"beginning, middle and end of {cycles} cycles", rows)
    report.write()
    return int(rows["aioserve"]["flat"] != "yes")


if __name__ == "__main__":
    parser = measuring.parser(__doc__, rounds=100)
    parser.add_argument("--count", nargs=2, help="for its own use")
    arguments = parser.parse_args()
    measuring.more_descriptors(20_000)
    if arguments.count:
        if arguments.count[1] == "traced":
            tracemalloc.start()
        children.reply(measuring.run(count(arguments.count[0], arguments.rounds * PER_ROUND), arguments.loop))
    else:
        raise SystemExit(main(arguments))
