"""
The examples of the README run, and print what the README says; its tables agree with the code.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import contextlib
import doctest
import importlib.metadata
import inspect
import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser

import aioserve
from aioserve import _options
from aioserve._process import command as __main__
from aioserve._process import program as _program
from aioserve._settings import parse
from tests.conftest import WARNINGS_ARE_ERRORS
from tests.helpers.apps import App

README = Path(__file__).parents[2] / "README.md"


class Evaluator:
    """
    Runs Python blocks, with `await` at their top level as in a notebook, and compares what they print with the text
    block that follows; hands blocks with tests in them to pytest.
    """

    def __init__(self, runner: asyncio.Runner, path: Path) -> None:
        self.runner = runner
        self.path = path
        self.printed = ""
        self.files = 0

    def python(self, example: Example) -> None:
        if "def test_" in example.parsed:
            self.run_tests(example.parsed)
            return
        source = "\n" * example.parsed.line_offset + example.parsed
        code = compile(source, str(README), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            if code.co_flags & inspect.CO_COROUTINE:
                self.runner.run(eval(code, example.namespace))  # noqa: S307 (our own README)
            else:
                exec(code, example.namespace)  # noqa: S102
        self.printed = out.getvalue()

    def run_tests(self, source: str) -> None:
        self.files += 1
        file = self.path / f"test_example_{self.files}.py"
        file.write_text(source)
        (self.path / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *WARNINGS_ARE_ERRORS, str(file)]
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, check=False)  # noqa: S603
        assert done.returncode == 0, done.stdout

    def text(self, example: Example) -> str | None:
        if doctest.OutputChecker().check_output(example.parsed, self.printed, doctest.ELLIPSIS):
            return None
        return f"Expected:\n{example.parsed}\nPrinted:\n{self.printed}"


def sections() -> dict[str, str]:
    """Return the sections of the README with Python code by their headings; each can be run alone."""
    _, *parts = re.split(r"^#+ (.*)$", README.read_text(), flags=re.MULTILINE)
    code = {heading: text for heading, text in zip(parts[::2], parts[1::2], strict=True) if "```python" in text}
    assert len(code) == 22
    return code


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """Undo what an example may do to the whole program."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error", "uvicorn.access")]
    before = sys.stderr, [(logger, logger.level, logger.propagate) for logger in loggers]
    yield
    sys.stderr, states = before
    for logger, level, propagate in states:
        logger.handlers.clear()
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.mark.usefixtures("as_it_was")
@pytest.mark.parametrize("text", sections().values(), ids=sections())
def test_example_of_the_readme_prints_what_the_readme_says(text: str, tmp_path: Path) -> None:
    """An example that consists of tests passes."""
    with asyncio.Runner() as runner:
        evaluator = Evaluator(runner, tmp_path)
        parsers = [CodeBlockParser("python", evaluator.python), CodeBlockParser("text", evaluator.text)]
        document = Document(text, str(README))
        for parser in parsers:
            for region in parser(document):
                document.add(region)
        for example in document.examples():
            example.evaluate()


def test_code_that_the_readme_replaces_is_valid_python() -> None:
    """It is compiled and not run: it shows how other libraries are used."""
    blocks = re.findall(r"^```py\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if not block.startswith("# ")]  # a file that tests/integration runs
    assert len(blocks) == 4
    for block in blocks:
        compile(block, str(README), "exec")


def test_options_in_the_readme_are_all_the_options() -> None:
    """With their defaults."""
    section = README.read_text().split("## Three ways to start")[1].split("\n## ")[0]
    rows: dict[str, str] = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section, flags=re.MULTILINE))
    assert set(rows) == {*_options.OWN_OPTIONS, "lifespan", "factory"}
    settings = parse(App(), {})
    defaults: dict[str, Any] = {name: ast.literal_eval(value) for name, value in rows.items()}
    for name in set(_options.OWN_OPTIONS) - set(_options.LISTEN_OPTIONS):
        assert getattr(parse(App(), {name: defaults[name]}), name) == getattr(settings, name)
    for name in _options.LISTEN_OPTIONS:  # passing the default is the same as passing nothing
        rest = {"uds": "app.sock"} if name == "uds_mode" else {}
        said: Any = parse(App(), {**rest, name: defaults[name]}).bind
        unsaid: Any = parse(App(), rest).bind
        assert (said.func, said.args, said.keywords) == (unsaid.func, unsaid.args, unsaid.keywords)
    for name in ("lifespan", "factory"):
        assert getattr(settings.config, name) == defaults[name]


def test_names_in_the_readme_are_public() -> None:
    """Every error and every member of `Server` that the README mentions."""
    text = README.read_text()
    for name in set(re.findall(r"`(\w+Error)`", text)) - {name for name in dir(builtins) if name.endswith("Error")}:
        assert name in aioserve.__all__
    members = text.split("A `Server` has\n")[1].split("\nHandlers")[0]
    found = set(re.findall(r"`(?:await )?(\w+)(?:\(.*?\))?`", members))
    classes = (aioserve.Stats, aioserve.Report, aioserve.UnfinishedHandler)
    fields = {field for each in classes for field in each.__annotations__}
    assert found - fields == {name for name in dir(aioserve.Server) if not name.startswith("_")}
    assert fields - found == set()


def test_exit_codes_in_the_readme_are_those_of_the_command_line() -> None:
    """And the members of `ServerProcess` that the README lists are all there are."""
    text = README.read_text()
    rows = re.findall(r"^\| (\d) \| ", text.split("| exit code |")[1].split("\n\n")[0], flags=re.MULTILINE)
    codes = (_program.GRACEFUL, _program.FORCED, __main__.USAGE_ERROR, _program.NOT_STARTED)
    assert tuple(map(int, rows)) == codes
    members = text.split("It yields a `ServerProcess`")[1].split("\n\n")[0]
    found = set(re.findall(r"`(\w+)(?:\(\))?`", members)) - {"Server"}
    assert found == {name for name in dir(aioserve.ServerProcess) if not name.startswith("_")}


def test_description_of_the_package_shows_no_picture_and_links_to_no_file_that_an_index_lacks() -> None:
    """There, the README stands alone."""
    description = importlib.metadata.metadata("aioserve-asgi").json["description"]
    assert isinstance(description, str)
    assert "async with serving(app" in description
    assert [
        target for target in re.findall(r"\]\(([^)]*)\)", description) if not target.startswith(("http", "#"))
    ] == []
