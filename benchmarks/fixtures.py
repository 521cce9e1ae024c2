"""
What does a real server for each test cost, against a fake one?

Timed, in turn, as whole runs of pytest in processes of their own: a session of 1,000 async tests, each with a start of
the app, one request and an end:

- aioserve: the fixture `aioserve_client`, so a real server and a real connection
- aioserve, not raising: the same with `raise_app_exceptions=False`
- fake: `httpx.ASGITransport` in a client, with asgi-lifespan around it
- nothing: the same tests without an app, which is what pytest, anyio's plugin and its loops cost by themselves

Printed: the median of each in seconds, its ratio to the fake, and what a test has cost more than nothing.

    python benchmarks/fixtures.py [--rounds 10] [--tests 1000] [--json FILE]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from common import measuring

COMMON = """
import httpx
import pytest
from asgi_lifespan import LifespanManager
from fastapi import FastAPI

app = FastAPI()


@app.get("/")
async def hello():
    return "hello"


@pytest.fixture
def anyio_backend():
    return "asyncio"
"""

WAYS = {
    "aioserve": """
@pytest.mark.parametrize("number", range({tests}))
async def test_hello(aioserve_client, number):
    client = await aioserve_client(app)
    assert (await client.get("/")).json() == "hello"
""",
    "aioserve, not raising": """
@pytest.mark.parametrize("number", range({tests}))
async def test_hello(aioserve_client, number):
    client = await aioserve_client(app, raise_app_exceptions=False)
    assert (await client.get("/")).json() == "hello"
""",
    "fake": """
@pytest.fixture
async def client():
    async with LifespanManager(app) as manager:
        transport = httpx.ASGITransport(manager.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


@pytest.mark.parametrize("number", range({tests}))
async def test_hello(client, number):
    assert (await client.get("/")).json() == "hello"
""",
    "nothing": """
@pytest.fixture
async def client():
    yield


@pytest.mark.parametrize("number", range({tests}))
async def test_hello(client, number):
    pass
""",
}

PLUGINS = ["anyio.pytest_plugin", "aioserve.pytest_plugin"]  # and none else that happens to be installed


def run(path: Path, tests: int) -> float:
    """Run one of them, and return how long it took."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "anyio_mode=auto", "-p", "no:cacheprovider", str(path)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": ",".join(PLUGINS)}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    assert f"{tests} passed" in done.stdout, done.stdout
    return took


def measure(rounds: int, tests: int) -> dict[str, list[float]]:
    """Return what each way took, in seconds."""
    took: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, f"test_{name}.py") for name in WAYS}
        for name, way in WAYS.items():
            paths[name].write_text(COMMON + way.format(tests=tests))
        for number in range(rounds):
            for name in paths if number % 2 else reversed(paths):
                took[name].append(run(paths[name], tests))
    return took


if __name__ == "__main__":
    parser = measuring.parser(__doc__, rounds=10)
    parser.add_argument("--tests", type=int, default=1000, help="how many tests to a session; default: 1000")
    arguments = parser.parse_args()
    report = measuring.Report(__file__, arguments)
    print(", ".join(f"{name} {version(name)}" for name in ("httpx2", "httpx", "asgi-lifespan", "fastapi", "pytest")))
    took = measure(arguments.rounds, arguments.tests)
    report.times(f"{arguments.tests} tests", took, to="fake", unit="s")
    nothing = statistics.median(took["nothing"])
    more = {name: (statistics.median(each) - nothing) / arguments.tests * 1000 for name, each in took.items()}
    report.table("more than nothing, for each test", {name: {"ms": each} for name, each in more.items()})
    report.write()
