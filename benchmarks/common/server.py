"""
A process that serves, as it is told: `children.serve()` starts it.

"start" is answered with the port, "stop" with how many seconds it took, "idle" with what a server that does nothing
has cost in so many seconds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import selectors
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import measuring, peers
from common.children import questions, reply

turns = 0


class Counting(selectors.DefaultSelector):
    """Counts how often a loop goes to sleep."""

    def select(self, timeout: float | None = None) -> Any:
        global turns
        turns += 1
        return super().select(timeout)


async def main(peer: str, options: Any) -> None:
    """Do as told, until nobody is there."""
    start = peers.PEERS[peer](**options)
    running = None
    async for question in questions():
        if question == "start":
            running = await start()
            reply(running.port())
        elif question == "stop":
            assert running is not None
            before = time.perf_counter()
            await running.stop()
            reply(time.perf_counter() - before)
        else:
            reply(await idle(question["idle"]))


async def idle(seconds: float) -> dict[str, float]:
    """Sleep, and say what happened meanwhile, in all threads of this process."""
    before, cpu, turned = resource.getrusage(resource.RUSAGE_SELF), time.process_time(), turns
    await asyncio.sleep(seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "turns": turns - turned,
        "switches": after.ru_nvcsw - before.ru_nvcsw,
        "cpu": time.process_time() - cpu,
    }


if __name__ == "__main__":
    measuring.more_descriptors(20_000)
    logging.disable()  # of what a peer has had to cancel
    if sys.argv[2] == "uvloop":
        measuring.run(main(sys.argv[1], json.loads(sys.argv[3])), "uvloop")
    else:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(Counting())) as runner:
            runner.run(main(sys.argv[1], json.loads(sys.argv[3])))
