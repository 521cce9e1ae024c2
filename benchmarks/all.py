"""
Ask all the questions, and write the answers into the page on speed and its picture.

    python benchmarks/all.py                 measure what the page shows; in 20 minutes, on a quiet machine
    python benchmarks/all.py --again         write the figures and the picture from what was measured last
    python benchmarks/all.py --rounds 5      see whether all of it runs, in a few minutes; nothing is kept

It needs the extra `bench`, and wrk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import showing

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "explanation" / "speed.md"
PICTURE = HERE.parent / "docs" / "images" / "start_stop.svg"
RESULTS = HERE / "results"

RUNS = {
    "start_stop-asyncio": ["start_stop.py"],
    "start_stop-uvloop": ["start_stop.py", "--loop", "uvloop"],
    "first_byte-asyncio": ["first_byte.py"],
    "stop_with_clients-asyncio": ["stop_with_clients.py", "--rounds", "15"],
    **{
        f"throughput-{http}-{loop}": ["throughput.py", "--http", http, "--loop", loop, "--rounds", rounds]
        for http, rounds in (("h11", "15"), ("httptools", "15"), ("zttp", "15"), ("http2", "100"))  # h2load is quick
        for loop in ("asyncio", "uvloop")
    },
    "idle-asyncio": ["idle.py"],
    "many_servers-asyncio": ["many_servers.py"],
    "cycles-asyncio": ["cycles.py", "--rounds", "40"],
    "imports": ["imports.py"],
    "restarts": ["restarts.py"],
    "fixtures": ["fixtures.py", "--rounds", "3"],
}
SMALLER = {
    "many_servers-asyncio": ["--servers", "100"],
    "fixtures": ["--tests", "50"],
    "idle-asyncio": ["--rounds", "1"],
    **{name: ["--rounds", "1"] for name in RUNS if name.startswith("throughput-")},
}


def measure(folder: Path, rounds: int | None) -> list[str]:
    """Run the scripts, with their own numbers of rounds or with this one; return those that failed."""
    options = [] if rounds is None else ["--rounds", str(rounds)]
    commands = {name: [*run, "--json", str(folder / f"{name}.json")] for name, run in RUNS.items()}

    environment = dict(os.environ)
    if rounds is not None:
        environment["GRACE"] = "1"  # for peers that do not stop before it is over
        commands = {name: [*command, *options, *SMALLER.get(name, [])] for name, command in commands.items()}
    failed = []
    for name, (script, *rest) in commands.items():
        print(f"\n=== {name}", flush=True)
        began = time.perf_counter()
        if subprocess.run([sys.executable, str(HERE / script), *rest], env=environment, check=False).returncode:
            failed.append(name)
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)
    return failed


def show(folder: Path, page: Path, picture: Path) -> None:
    """Write what came out."""
    results = showing.read(folder)
    picture.write_text(showing.picture(results))
    showing.put_into(page, showing.tables(results))


def main() -> int:
    """Return how many scripts failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="for each script; nothing is kept")
    parser.add_argument("--again", action="store_true", help="measure nothing")
    arguments = parser.parse_args()

    if arguments.rounds is None:
        RESULTS.mkdir(exist_ok=True)
        failed = [] if arguments.again else measure(RESULTS, None)
        if arguments.again and not all((RESULTS / f"{name}.json").exists() for name in RUNS):
            raise SystemExit(f"not everything has been measured: {RESULTS} has no JSON of some; run without --again")
        if not failed:
            show(RESULTS, PAGE, PICTURE)
    else:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            failed = measure(folder, arguments.rounds)
            copy = folder / "speed.md"
            copy.write_text(PAGE.read_text())
            if not failed:
                show(folder, copy, folder / "start_stop.svg")
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
