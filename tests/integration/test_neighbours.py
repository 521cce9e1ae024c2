"""
The tools that `docs/testing.md` is about work beside aioserve's fixtures: each block of code there is a test module.
"""

from __future__ import annotations

import re

import pytest

from tests.helpers.programs import ROOT
from tests.helpers.projects import WITHOUT_ASYNCIO, backend

APP, *MODULES = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "testing.md").read_text(), re.M | re.S)


@pytest.mark.timeout(180)  # a browser takes seconds to start
@pytest.mark.parametrize("module", MODULES, ids=lambda module: re.findall(r"def test_(\w+)", module)[0])
def test_example_of_the_page_on_testing_passes(pytester: pytest.Pytester, module: str) -> None:
    """With pytest's anyio plugin; warnings are those of the tools, and are not ours to fail for."""
    pytester.makepyfile(app=APP, conftest=backend("session"), test_it=module)
    done = pytester.runpytest_subprocess(*WITHOUT_ASYNCIO, "-p", "no:cacheprovider", "-o", "anyio_mode=auto")
    done.assert_outcomes(passed=len(re.findall(r"^(?:async )?def test_", module, re.M)) + module.count("[None, httpx"))
