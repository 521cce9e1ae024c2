"""
Everything that is checked, each in an environment of its own: `nox --list` says what, and `.ci/run` runs it all.

    nox -s lint types
    nox -s tests-3.13 -- tests/stop
    nox -s "variants(eager)" -P 3.14

What follows `--` goes to pytest. What names no Python runs on the one that runs nox, or on that which `-P` names.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import tomllib
from pathlib import Path

import nox

PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
HERE = Path(__file__).parent

nox.options.default_venv_backend = "venv"
nox.options.download_python = "never"
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True

# An environment that is there already gets what is new as well.
NEWEST = ["--upgrade", "--upgrade-strategy", "eager"]


def oldest() -> list[str]:
    """Return pins to the lowest versions that pyproject.toml allows."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    return [dependency.replace(">=", "==") + ".*" for dependency in project["dependencies"]]


# Tests that run whole programs, which choose their loops and protocols by themselves: they need not be run with each.
PROGRAMS = [f"tests/{name}" for name in ("command_line", "docs", "process", "signals", "testing/plugin", "windows")]
WITHOUT_PROGRAMS = [f"--ignore={folder}" for folder in PROGRAMS]

# Tests of what a loop has only on Unix, besides.
WITHOUT_UNIX = [*WITHOUT_PROGRAMS, "--ignore=tests/sockets"]

# What else the suite can be run on: asyncio's debug mode, eager tasks, and uvicorn's protocols. Each is there once, and
# httptools and websockets-sansio in all other sessions: the newest uvicorn takes them where no option says another.
VARIANTS = {
    "debug": ["--loop", "debug", "--http", "h11", "--ws", "websockets"],
    "eager": ["--loop", "eager", "--http", "zttp", "--ws", "wsproto"],
}


def install(session: nox.Session, dependencies: str) -> None:
    """Install the checkout and what its tests need, with the newest uvicorn and anyio or with the oldest."""
    session.install(*(oldest() if dependencies == "oldest" else NEWEST), "-e", ".[test]")


def run_suite(session: nox.Session, *options: str) -> None:
    """Run the suite; say first on what, and at last what took long. The README's command walks through every turn."""
    session.run(
        "python",
        "-c",
        "import platform; from importlib.metadata import version as v; "
        "print('uvicorn', v('uvicorn'), 'anyio', v('anyio'), 'python', platform.python_version(), flush=True)",
    )
    session.run("python", "-m", "pytest", "-n", "3", "--every", "10", "--durations", "10", *options, *session.posargs)


@nox.session(python=PYTHONS)
@nox.parametrize("dependencies", ["newest", "oldest"], ids=["newest", "oldest"])
def tests(session: nox.Session, dependencies: str) -> None:
    """The suite, on each Python, with the newest uvicorn and anyio and with the oldest."""
    install(session, dependencies)
    run_suite(session, *WITHOUT_PROGRAMS)


@nox.session
def programs(session: nox.Session) -> None:
    """The tests of whole programs, and of what we rely on in uvicorn, with the oldest uvicorn and anyio."""
    install(session, "oldest")
    run_suite(session, *PROGRAMS, "tests/with_uvicorn")


@nox.session
@nox.parametrize("variant", list(VARIANTS), ids=list(VARIANTS))
def variants(session: nox.Session, variant: str) -> None:
    """The suite on another loop, with other protocols of uvicorn; `debug` has the oldest uvicorn and anyio."""
    if variant == "eager" and (session.python or platform.python_version()).startswith("3.11"):
        session.skip("eager tasks came with Python 3.12")
    install(session, "oldest" if variant == "debug" else "newest")
    run_suite(session, *VARIANTS[variant], *WITHOUT_PROGRAMS)


@nox.session
def portable(session: nox.Session) -> None:
    """The suite on a loop that can do only what every loop can, as on Windows."""
    install(session, "newest")
    run_suite(session, "--loop", "portable", *WITHOUT_UNIX)


@nox.session
def integration(session: nox.Session) -> None:
    """What needs programs that pip does not install; `.ci/run` does."""
    session.install(*NEWEST, "-e", ".[integration]")
    options = ["-n", "3", "--durations", "10", "--integration", "tests/integration"]
    session.run("python", "-m", "pytest", *options, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """How the code looks, how long its files are, and which of them imports which."""
    session.install("ruff", "import-linter")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("python", ".ci/sizes.py")
    # It only reads the source: nothing of what that imports has to be installed.
    session.run("lint-imports", "--no-cache", "--no-logo", env={"PYTHONPATH": "src"})


@nox.session
def types(session: nox.Session) -> None:
    """Whether the types fit, and whether users see them all."""
    session.install(*NEWEST, ".[dev]")
    session.run("mypy")
    # What cannot be run here, can be read.
    for system in ("linux", "darwin", "win32"):
        for python in (PYTHONS[0], PYTHONS[-1]):
            # Without a cache, which would be that of another system.
            session.run("mypy", "--cache-dir", os.devnull, "--platform", system, "--python-version", python, "src")
    # It looks at what is installed, in the active environment only, and must not find the checkout.
    with tempfile.TemporaryDirectory() as away, session.chdir(away):
        session.run("pyright", "--ignoreexternal", "--verifytypes", "aioserve")


@nox.session
def docs(session: nox.Session) -> None:
    """The site: whether it can be built, whether its links lead somewhere, and how its words are spelt."""
    session.install(*NEWEST, "-e", ".[docs]", "codespell", "linkchecker")
    session.run("zensical", "build", "--strict", "--clean")
    session.run("linkchecker", "--config", ".linkcheckerrc", "--no-status", "site/index.html")
    session.run("codespell")


@nox.session(reuse_venv=False)  # pip would take an older wheel of the same version for this one
def wheel(session: nox.Session) -> None:
    """The suite on the wheel, away from the checkout; a package index would take wheel and sdist."""
    session.install("build", "twine")
    with tempfile.TemporaryDirectory() as away:
        session.run("python", "-m", "build", "--outdir", f"{away}/dist", silent=True)
        session.run("twine", "check", "--strict", f"{away}/dist/*")
        (built,) = Path(away, "dist").glob("*.whl")
        session.install(f"{built}[test]")
        for name in ("docs", "examples", "tests"):
            shutil.copytree(HERE / name, Path(away, name))
        for path in (*HERE.glob("*.md"), *HERE.glob("*.toml")):
            shutil.copy(path, away)
        with session.chdir(away):
            session.run(
                "python", "-c", "import aioserve; assert 'site-packages' in aioserve.__file__, aioserve.__file__"
            )
            run_suite(session)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Whether the benchmarks run; what they measure takes more rounds."""
    session.install(*NEWEST, ".[bench]")
    session.run("python", "benchmarks/all.py", "--rounds", "2")
    # Compared with itself. A round is too short to be precise, so the limit is high.
    compared = ["start-stop", "start-stop-uvloop", "calls", "stop-1", "import"]
    session.run("python", "benchmarks/versions.py", "--other", "src", "--rounds", "1", "--limit", "2", *compared)


@nox.session
def versions(session: nox.Session) -> None:
    """Whether this version is slower than another one: `nox -s versions -- --other ../old/src`."""
    session.install(*NEWEST, ".[bench]")
    session.run("python", "benchmarks/versions.py", *session.posargs)


@nox.session
def measure(session: nox.Session) -> None:
    """The benchmarks' figures, for the page on speed; on a quiet machine."""
    session.install(*NEWEST, ".[bench]")
    session.run("python", "benchmarks/all.py", *session.posargs)
