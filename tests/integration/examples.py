"""
The files of `examples/`, and what the pages on deployment say of them.
"""

from __future__ import annotations

import re

from tests.helpers.pages import Page
from tests.helpers.programs import ROOT

EXAMPLES = ROOT / "examples"
DEPLOY = EXAMPLES / "deploy"


def file(name: str) -> str:
    """Return the content of a file for a deployment."""
    return (DEPLOY / name).read_text(encoding="utf-8")


def command(page: str, beginning: str) -> str:
    """Return the shell command of a page on deployment with this beginning."""
    (found,) = [block for block in Page(f"docs/deploying/{page}.md").blocks("console") if block.startswith(beginning)]
    return found.strip()


def sums(column: str) -> list[float]:
    """Return the numbers in a column of the table of times of a stop; the last one is the supervisor's limit."""
    table = (
        Page("docs/deploying/readiness.md").text.split("## How long can a stop take?")[1].split("\n\n")[2].splitlines()
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    numbers = [re.search(r"\d+$", row[rows[0].index(column)].strip("`")) for row in rows[2:]]
    return [float(number[0]) for number in numbers if number is not None]
