"""
The examples of the README run, and print what the README says; its tables agree with the code.
"""

from __future__ import annotations

import ast
import builtins
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import aioserve
from aioserve import _options
from aioserve._process import command as __main__
from aioserve._process import program as _program
from aioserve._settings import parse
from tests.helpers.apps import App

README = Path(__file__).parents[2] / "README.md"


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
