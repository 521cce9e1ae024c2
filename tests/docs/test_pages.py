"""
What the documentation says is said once, and agrees with the code.
"""

from __future__ import annotations

import ast
import builtins
import importlib.metadata
import itertools
import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

import aioserve
from aioserve import _serving, _shutdown
from aioserve._process import command, program
from tests.helpers.pages import Page, pages
from tests.helpers.programs import ROOT

README = Page("README.md")
CONTRACT = Page("docs/explanation/exit-contract.md")
STOP = Page("docs/explanation/stop.md")


def docstring(path: str | None) -> str:
    """Return the docstring of a module's file, also where Python runs without docstrings."""
    assert path is not None
    return ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8"))) or ""


def numbered(text: str) -> list[str]:
    """Return the points of the first numbered list, each on one line and without bold type."""
    points = re.findall(r"^\d\. (.*?)(?=^\d\. |^\S|^$|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(point.replace("**", "").split()) for point in points]


def phases(text: str) -> dict[str, str]:
    """Return the phases of a stop as the code has them."""
    found = re.findall(r"^    (\w[\w ]*?)  +(.*(?:\n {8,}.*)*)", text, flags=re.MULTILINE)
    return {name: " ".join(description.split()) for name, description in found}


def test_rules_of_the_exit_contract_are_those_of_the_code() -> None:
    """And the README has the first sentence of each."""
    rules = numbered(docstring(_serving.__file__))
    assert len(rules) == 8
    assert numbered(CONTRACT.text) == rules
    assert numbered(README.text.split("## What it promises")[1]) == [rule.partition(". ")[0] + "." for rule in rules]


def test_phases_of_a_stop_are_those_of_the_code() -> None:
    """And the README names them in their order."""
    found = phases(docstring(_shutdown.__file__))
    assert len(found) == 8
    rows = STOP.text.split("| phase | what happens |\n| --- | --- |\n")[1].split("\n\n")[0]
    assert dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", rows, flags=re.MULTILINE)) == found
    assert ", ".join(found) in " ".join(README.text.split())
    architecture = Page("docs/explanation/architecture.md").text.split("### The phases")[1].split("\n### ")[0]
    named = re.findall(r"^\| ([a-z ]+) \| ", architecture, flags=re.MULTILINE)
    assert named == ["phase", *found, "closed"]


def sentences(page: Page) -> set[str]:
    """Return the sentences of six words and more, without links, code and markup."""
    text = re.sub(r"<!--.*?-->", "", page.prose(), flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    if page.name == CONTRACT.name:  # the README has the first sentences of the rules, as the test above says
        text = text.replace("\n".join(re.findall(r"^\d\..*", text, flags=re.MULTILINE)), "")
    blocks = re.split(r"\n\s*\n|\n(?=[-|\d#])|\|", text)
    found = itertools.chain.from_iterable(re.split(r"(?<=[.!?:])\s+", " ".join(block.split())) for block in blocks)
    plain = (re.sub(r"[*#]|^[-\d.]+ ", "", each).strip() for each in found)
    return {each for each in plain if len(each.split()) >= 6 and not each.endswith("?")}


def test_no_sentence_is_there_twice() -> None:
    """But for the titles of other pages, and the first sentences of the exit contract in the README."""
    where = defaultdict(list)
    contract = {rule.partition(". ")[0] + "." for rule in numbered(CONTRACT.text)}
    for page in pages():
        if page.name != "docs/changelog.md":
            for sentence in sentences(page) - contract:
                where[sentence].append(page.name)
    assert {sentence: names for sentence, names in where.items() if len(names) > 1} == {}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_page_is_no_longer_than_250_lines(page: Page) -> None:
    """The README has 150 at most; and no page has a table of options, which the reference has."""
    assert len(page.text.splitlines()) <= (150 if page.name == "README.md" else 250)
    assert not re.search(r"^\| option ", page.text, flags=re.MULTILINE)


def test_each_page_is_in_the_navigation_and_in_the_index() -> None:
    """Its title there is the page's own."""
    names = {page.name.removeprefix("docs/"): page for page in pages() if page.name != "README.md"}
    navigation = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    assert set(re.findall(r'= "([\w/-]+\.md)"', navigation)) == set(names)
    index = names.pop("index.md")
    links = dict(re.findall(r"\[([^\]]*)\]\(([\w/-]+\.md)\)", index.text))
    assert set(links.values()) == set(names)


def test_links_lead_somewhere() -> None:
    """Those between pages, and those to files of the checkout; the site's build checks the former as well."""
    others = [Page(name) for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "tests/README.md")]
    for page in [*pages(), *others]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.prose()):
            path, _, anchor = target.partition("#")
            if path.startswith(("http://", "https://")):
                continue
            file = (ROOT / page.name).parent / path if path else ROOT / page.name
            assert file.exists(), f"{page.name} links to {target}"
            if anchor and not anchor.startswith("aioserve."):
                assert anchor in anchors(file), f"{page.name} links to {target}"


def anchors(file: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are made on most sites."""
    headings = re.findall(r"^#+ (.*)$", Page(file.resolve().relative_to(ROOT).as_posix()).prose(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_each_example_is_shown_by_a_page() -> None:
    """By a snippet, which the site's build replaces by the file."""
    shown = set(re.findall(r"^(?:--8<-- \"|--8<--\n)(examples/[\w./]+)", "".join(page.text for page in pages()), re.M))
    assert shown == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "examples").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_names_in_the_documentation_are_public() -> None:
    """Every error that it mentions, and each public name is on a page of the reference."""
    known = set(aioserve.__all__) | {name for name in dir(builtins) if name.endswith("Error")}
    others = {"CancelledError", "LookupError", "HTTPError", "SSLError", "ConnectError", "UsageError"}
    for page in pages():
        assert set(re.findall(r"`(\w+Error)`", page.prose())) <= known | others, page.name
    reference = "".join(page.text for page in pages() if page.name.startswith("docs/reference/"))
    described = set(re.findall(r"^::: aioserve\.(\w+)$", reference, flags=re.MULTILINE))
    assert described | {"App", "Options"} == set(aioserve.__all__) | {"testing"}


def test_exit_codes_are_those_of_the_command_line() -> None:
    """In their order."""
    table = Page("docs/guides/command-line.md").text.split("| exit code |")[1].split("\n\n")[0]
    codes = (program.GRACEFUL, program.FORCED, command.USAGE_ERROR, program.NOT_STARTED)
    assert tuple(map(int, re.findall(r"^\| (\d) \| ", table, flags=re.MULTILINE))) == codes


def test_readme_has_the_two_commands_that_set_everything_up() -> None:
    """`.ci/run` takes them from there."""
    commands = re.findall(r"^python3 -m venv \.venv && (.*)$", README.text, flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("-m aioserve.demo")
    assert commands[1].endswith("-m pytest")


def test_description_of_the_package_shows_no_picture_and_links_to_no_file_that_an_index_lacks() -> None:
    """There, the README stands alone."""
    description = importlib.metadata.metadata("aioserve-asgi").json["description"]
    assert isinstance(description, str)
    assert "async with serving(app" in description
    assert [
        target for target in re.findall(r"\]\(([^)]*)\)", description) if not target.startswith(("http", "#"))
    ] == []


def test_newest_version_in_the_changelog_is_that_of_the_package() -> None:
    """`pyproject.toml` is its only other place."""
    versions = re.findall(r"^## \[(\d[\d.]*)\] - \d{4}-\d\d-\d\d$", Page("CHANGELOG.md").text, flags=re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert versions[0] == project["version"]
