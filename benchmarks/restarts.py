"""
How many requests are lost when a server is restarted under load?

200 clients in another process; 100 restarts on one lent socket:

- fresh: a new connection for each request
- drained: kept-alive connections, with a `drain_delay` in which each client asks again, and is told to go
- kept-alive: the same without it; what is lost is HTTP/1.1's own race, a request that crosses the close on its way

Printed, and written as JSON: what the clients counted. "unanswered" failed with not a byte of an answer, and could be
sent again; "broken" with a part of one. All but the last are to be 0.

    python benchmarks/restarts.py [--rounds 100] [--clients 200]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.restarting import restart_under_load

QUESTIONS: dict[str, dict[str, Any]] = {
    "fresh": {"kind": "fresh"},
    "drained": {"kind": "kept-alive", "drain_delay": 0.3},
    "kept-alive": {"kind": "kept-alive"},
}


async def main(rounds: int, clients: int) -> int:
    """Ask all three; return how many requests were lost that should not have been."""
    results = {}
    for name, options in QUESTIONS.items():
        began = time.perf_counter()
        results[name] = await restart_under_load(restarts=rounds, clients=clients, **options)
        print(f"{name:12}", results[name], f"{time.perf_counter() - began:.1f} s", file=sys.stderr)
    print(json.dumps(results))
    return sum(counts["broken"] + counts["unanswered"] * (name != "kept-alive") for name, counts in results.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Restart a server under load.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=200)
    arguments = parser.parse_args()
    sys.exit(asyncio.run(main(arguments.rounds, arguments.clients)) != 0)
