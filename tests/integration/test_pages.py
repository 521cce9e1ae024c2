"""
The examples of the documentation that need more packages than the suite.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.pages import WITH_MORE_PACKAGES, Page
from tests.helpers.programs import ROOT

RUN = """
import sys
from pathlib import Path
from tests.helpers.pages import Page
Page(sys.argv[1]).run(sys.argv[2], Path(sys.argv[3]))
"""

EXAMPLES = [
    pytest.param(page, section, id=f"{page.name}: {section}")
    for page in map(Page, sorted(WITH_MORE_PACKAGES))
    for section in page.sections()
]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("page", "section"), EXAMPLES)
def test_example_prints_what_the_page_says(page: Page, section: str, tmp_path: Path) -> None:
    """In a process of its own, which some packages change; an example that consists of tests passes."""
    command = [sys.executable, "-c", RUN, page.name, section, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 (our own pages)
    assert done.returncode == 0, done.stdout + done.stderr
