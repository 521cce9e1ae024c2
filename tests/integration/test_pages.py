"""
The examples of the documentation that need more packages than the suite.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.pages import WITH_MORE_PACKAGES, Page

EXAMPLES = [
    pytest.param(page, section, id=f"{page.name}: {section}")
    for page in map(Page, sorted(WITH_MORE_PACKAGES))
    for section in page.sections()
]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("page", "section"), EXAMPLES)
def test_example_prints_what_the_page_says(page: Page, section: str, tmp_path: Path) -> None:
    """An example that consists of tests passes."""
    page.run(section, tmp_path)
