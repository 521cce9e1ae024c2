"""
Say which files, classes and functions of `src/` are too long, and whether all of it together is.

    python .ci/sizes.py [FOLDER]

A function's docstring does not count: the description of what users call may be long. Prints each offence as
`path:line: message`, and exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE = 400
CLASS = 250
FUNCTION = 60  # a screen
ALL = 11_350  # raise it only for a feature that is worth its lines


def length(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many lines it has, without its decorators, and without the docstring of a function."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if not isinstance(node, ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def too_long(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the message of each offence in a file."""
    lines = len(source.splitlines())
    if lines > FILE:
        yield 1, f"the file has {lines} lines, more than {FILE}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            kind, limit = "class", CLASS
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kind, limit = "function", FUNCTION
        else:
            continue
        if (lines := length(node)) > limit:
            yield node.lineno, f"{kind} {node.name} has {lines} lines, more than {limit}"


def main(folder: Path) -> int:
    """Return whether something is too long."""
    found = 0
    lines = 0
    for path in sorted(folder.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines += len(source.splitlines())
        for line, message in sorted(too_long(source)):
            print(f"{path}:{line}: {message}")
            found += 1
    if lines >= ALL:
        print(f"{folder}:1: all files have {lines} lines, and must have fewer than {ALL}")
        found += 1
    return int(found > 0)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "src")))
