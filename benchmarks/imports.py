"""
How long does importing us take?

Timed within new interpreters, in turn; what stands before the arrow has been imported already:

- uvicorn, anyio -> aioserve
- uvicorn, anyio -> `from aioserve import serving`, which brings the rest
- pytest -> `aioserve.pytest_plugin`, if there is one: every run of pytest of everybody who has installed us imports it

and for comparison, from nothing: asyncio; uvicorn and anyio; aiohttp.web.

    python benchmarks/imports.py [--rounds 50] [--json FILE]
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
from collections.abc import Awaitable, Callable

from common import children, measuring

IMPORTS = {
    "nothing -> asyncio": ("", "import asyncio"),
    "asyncio -> uvicorn, anyio": ("import asyncio", "import uvicorn, anyio"),
    "asyncio -> aiohttp": ("import asyncio", "import aiohttp.web"),
    "uvicorn, anyio -> aioserve": ("import uvicorn, anyio", "import aioserve"),
    "uvicorn, anyio -> serving": ("import uvicorn, anyio", "from aioserve import serving"),
}
if importlib.util.find_spec("aioserve.pytest_plugin") is not None:
    IMPORTS["pytest -> plugin"] = ("import pytest", "import aioserve.pytest_plugin")

PROGRAM = """
import json, sys, time
{before}
had = set(sys.modules)
began = time.perf_counter()
{timed}
took = time.perf_counter() - began
print(json.dumps([took, sorted(set(sys.modules) - had)]))
"""


def imported(name: str, interpreter: children.Interpreter = children.THIS) -> tuple[float, list[str]]:
    """Return how long it took, and which modules came with it."""
    before, timed = IMPORTS[name]
    program = PROGRAM.format(before=before, timed=timed)
    command = [interpreter.python, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=interpreter.environment)
    took, modules = json.loads(done.stdout)
    return took, modules


def way(name: str) -> Callable[[], Awaitable[float]]:
    """Time it."""

    async def timing() -> float:
        return imported(name)[0]

    return timing


if __name__ == "__main__":
    arguments = measuring.parser(__doc__, rounds=50).parse_args()
    report = measuring.Report(__file__, arguments)
    figures = asyncio.run(measuring.in_turn({name: way(name) for name in IMPORTS}, arguments.rounds, warm_up=1))
    report.times("import", figures, to="asyncio -> uvicorn, anyio")
    others = {
        name: [each for each in imported(name)[1] if "aioserve" not in each] for name in IMPORTS if "serv" in name
    }
    for name, modules in others.items():
        print(f"{name}: {len(modules)} modules of others: {', '.join(modules)}")
    report.write()
