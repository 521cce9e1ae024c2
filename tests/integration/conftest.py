"""
Tests with programs that pip does not install: they run with `--integration`, and fail where a program is missing.
"""

from __future__ import annotations

import shutil

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("--integration") else True


def program(name: str, package: str) -> str:
    """Where it is."""
    found = shutil.which(name)
    assert found is not None, f"{name} is not installed; on Debian: apt-get install {package}"
    return found
