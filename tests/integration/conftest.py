"""
Tests with programs that pip does not install: they run with `--integration`, and fail where a program is missing.
"""

from __future__ import annotations

import shutil
import socket
import struct
import zlib

import pytest

from tests.helpers.programs import ROOT

IMAGES = ROOT / "docs" / "images"
"""The pictures of the documentation: tests make them anew where `AIOSERVE_SCREENSHOT=1` is in the environment."""


def remark(shown: str) -> bytes:
    """Return the part of a PNG that says what it shows, so that a test finds out when it shows something else."""
    chunk = b"tEXtComment\0" + shown.encode("latin-1")
    return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))


def remarked(png: bytes, shown: str) -> bytes:
    """Return a PNG with a remark behind its header."""
    return png[:33] + remark(shown) + png[33:]


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("--integration") else True


def program(name: str, package: str) -> str:
    """Return the path of a program."""
    found = shutil.which(name)
    assert found is not None, f"{name} is not installed; on Debian: apt-get install {package}"
    return found


def free_port() -> int:
    """Return a port for a program that cannot say which one it has bound."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
