"""
The pages of the documentation, and how their examples are run.

- A block of `python` runs, with `await` at its top level as in a notebook; the blocks of a section run in order, in one
  namespace. A block of `text` behind it is what it prints.
- A block of `python` with tests in it is a test module, which pytest runs.
- A block whose first line is a comment with a file's name is that file, for all sections of its page.
- A block of `py` is compiled, and not run: it shows what another library does, or what never ends.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import inspect
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser

from tests.conftest import WARNINGS_ARE_ERRORS
from tests.helpers.programs import ROOT

README = ROOT / "README.md"

# The examples on these pages need more than the extra `test`: tests/integration runs them.
WITH_MORE_PACKAGES = {
    "docs/explanation/frameworks.md",
    "docs/explanation/tracing.md",
    "docs/testing/mocks.md",
    "docs/testing/other-tools.md",
}

_FILE = re.compile(r"# ([\w/-]+\.\w+)\n")


class Page:
    """A page in Markdown, by its path from the checkout."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (ROOT / name).read_text(encoding="utf-8")

    def blocks(self, *languages: str) -> list[str]:
        """Return the blocks of code in these languages; all, where none is said."""
        found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```$", self.text, flags=re.MULTILINE | re.DOTALL)
        return [code for language, code in found if not languages or language in languages]

    def files(self) -> dict[str, str]:
        """Return the files that the page shows, by their names."""
        return {found[1]: code for code in self.blocks() if (found := _FILE.match(code)) is not None}

    def prose(self) -> str:
        """Return the page without its code."""
        return re.sub(r"^```.*?^```$", "", self.text, flags=re.MULTILINE | re.DOTALL)

    def sections(self) -> dict[str, str]:
        """Return the sections with Python code that runs, by their headings; each can be run alone."""
        parts = {"": ""}
        heading, in_code = "", False
        for line in self.text.splitlines(keepends=True):
            if line.startswith("```"):
                in_code = not in_code
            if not in_code and re.match(r"#+ ", line):
                heading = line.strip("# \n")
                assert heading not in parts, f"{self.name}: two sections are called {heading!r}"
                parts[heading] = ""
            parts[heading] += line
        code = re.compile(rf"^```python\n(?!{_FILE.pattern})", flags=re.MULTILINE)
        return {heading: text for heading, text in parts.items() if code.search(text)}

    def run(self, section: str, directory: Path) -> None:
        """Run one section, in a directory with the page's files."""
        files = self.files()
        for name, content in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        with asyncio.Runner() as runner, _beside(directory, files):
            evaluator = _Evaluator(self.name, runner, directory)
            document = Document(self.sections()[section], self.name)
            for parser in (
                CodeBlockParser("python", evaluator.python),
                CodeBlockParser("text", evaluator.compare),
            ):
                for region in parser(document):
                    document.add(region)
            for example in document.examples():
                example.evaluate()


def pages() -> list[Page]:
    """Return the README and all pages of `docs/`."""
    names = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    return [Page(name) for name in ("README.md", *names)]


class _Evaluator:
    """Runs the blocks of one section."""

    def __init__(self, page: str, runner: asyncio.Runner, directory: Path) -> None:
        self.page = page
        self.runner = runner
        self.directory = directory
        self.printed = ""
        self.modules = 0

    def python(self, example: Example) -> None:
        if _FILE.match(example.parsed):
            return
        if "def test_" in example.parsed:
            self.run_tests(example.parsed)
            return
        source = "\n" * example.parsed.line_offset + example.parsed
        code = compile(source, self.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            if code.co_flags & inspect.CO_COROUTINE:
                self.runner.run(eval(code, example.namespace))  # noqa: S307 (our own pages)
            else:
                exec(code, example.namespace)  # noqa: S102
        self.printed = out.getvalue()

    def run_tests(self, source: str) -> None:
        self.modules += 1
        file = self.directory / f"test_example_{self.modules}.py"
        file.write_text(source, encoding="utf-8")
        (self.directory / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *WARNINGS_ARE_ERRORS, str(file)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        done = subprocess.run(  # noqa: S603 (our own pages)
            command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout

    def compare(self, example: Example) -> str | None:
        if doctest.OutputChecker().check_output(example.parsed, self.printed, doctest.ELLIPSIS):
            return None
        return f"Expected:\n{example.parsed}\nPrinted:\n{self.printed}"


@contextlib.contextmanager
def _beside(directory: Path, files: dict[str, str]) -> Iterator[None]:
    """Run in a directory whose modules can be imported."""
    path = sys.path[:]
    modules = {name.partition("/")[0].removesuffix(".py") for name in files if name.endswith(".py")}
    with contextlib.chdir(directory):
        sys.path.insert(0, str(directory))
        try:
            yield
        finally:
            sys.path[:] = path
            for name in [each for each in sys.modules if each.partition(".")[0] in modules]:
                del sys.modules[name]
