"""
Reloading an app while it is developed, as the page on swapping shows it.
"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.helpers.pages import Page
from tests.helpers.programs import Program

FILES = Page("docs/guides/swapping.md").files()


def replace(path: Path, text: str) -> None:
    """Write a file in one step, as editors do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


@pytest.mark.timeout(120)
def test_app_is_reloaded_when_its_file_changes_and_kept_when_the_change_is_wrong(tmp_path: Path) -> None:
    """On the same address, also for a connection that is open."""
    app = tmp_path / "site_app.py"
    app.write_text(FILES["site_app.py"])
    (tmp_path / "develop.py").write_text(FILES["develop.py"].replace("port=8000", "port=0"))
    with Program("-B", "develop.py", cwd=tmp_path) as develop:
        with httpx.Client(base_url=develop.wait_for("serving").split()[1]) as client:
            assert client.get("/").json() == "version 1"
            replace(app, FILES["site_app.py"].replace("version 1", "version two"))
            develop.wait_for("reloaded")
            assert client.get("/").json() == "version two"
            replace(app, "def")
            develop.wait_for("not reloaded: invalid syntax")
            assert client.get("/").json() == "version two"
        develop.process.terminate()
        assert develop.end() == (0, "")
