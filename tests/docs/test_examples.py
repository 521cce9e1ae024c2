"""
The examples of the documentation run, and print what it says.
"""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.http2 import needs_http2
from tests.helpers.pages import WITH_MORE_PACKAGES, Page, pages

EXAMPLES = [
    pytest.param(
        page,
        section,
        id=f"{page.name}: {section}",
        marks=needs_http2 if page.name == "docs/guides/http2.md" else (),
    )
    for page in pages()
    if page.name not in WITH_MORE_PACKAGES
    for section in page.sections()
]


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """Undo what an example may do to the whole program."""
    loggers = [logging.getLogger(name) for name in (None, "httpx", "uvicorn", "uvicorn.error", "uvicorn.access")]
    before = sys.stderr, [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    sys.stderr, states = before
    for logger, level, propagate, handlers in states:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.mark.usefixtures("as_it_was")
@pytest.mark.parametrize(("page", "section"), EXAMPLES)
def test_example_prints_what_the_page_says(page: Page, section: str, tmp_path: Path) -> None:
    """An example that consists of tests passes."""
    page.run(section, tmp_path)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_code_that_does_not_run_is_valid_python(page: Page) -> None:
    """It shows how other libraries are used, or what never ends."""
    for block in page.blocks("py"):
        if block.startswith("--8<--"):  # a file of examples/
            continue
        compile(block, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
