"""
The files in the README: each is a block of code whose first line is a comment with the file's name.
"""

from __future__ import annotations

import re

from tests.helpers.programs import ROOT


def file(name: str) -> str:
    """Return the content of the file with that name in the README."""
    return _only(rf"^```\w+\n(# {re.escape(name)}\n.*?)^```$")


def command(beginning: str) -> str:
    """Return the shell command of the README with this beginning."""
    return _only(rf"^```console\n({re.escape(beginning)}[^\n]*)\n```$")


def sums(column: str) -> list[float]:
    """Return the numbers in a column of the table of times of a stop; the last one is the supervisor's limit."""
    table = _readme().split("How long a stop can take is a sum")[1].split("\n\n")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    numbers = [re.search(r"\d+$", row[rows[0].index(column)].strip("`")) for row in rows[2:]]
    return [float(number[0]) for number in numbers if number is not None]


def _only(pattern: str) -> str:
    found: list[str] = re.findall(pattern, _readme(), flags=re.MULTILINE | re.DOTALL)
    assert len(found) == 1, (pattern, found)
    return found[0]


def _readme() -> str:
    return (ROOT / "README.md").read_text()
