"""
`serving_process()`: the start fails, or what was passed cannot be handed to another process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvicorn

from aioserve import (
    ServingError,
    StartupError,
    StartupTimeoutError,
    serving_process,
)
from aioserve._process import messages, spawn
from tests.helpers.apps import App
from tests.helpers.processes import TALKING, children, linux_only

pytestmark = linux_only


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("app", "options", "message", "note"),
    [
        (
            "nowhere:app",
            {},
            "^cannot load nowhere:app: there is no module nowhere in sys.path, which begins with /",
            None,
        ),
        ("tests.helpers.broken_module:app", {}, "cannot load .*AppError: at import", "broken_module.py"),
        ("tests.helpers.apps:broken_factory", {"factory": True}, "AppError: the factory's own", "apps.py"),
        ("tests.helpers.exiting_module:app", {}, "SystemExit", None),
        (
            "tests.helpers.children:failing",
            {},
            "the app's lifespan failed to start: AppError: the app's own",
            "apps.py",
        ),
    ],
)
async def test_failed_start_of_a_child_raises_the_error_of_serving(
    app: str, options: Any, message: str, note: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """The child's traceback is a note of the error, and is printed nowhere."""
    with pytest.raises(StartupError, match=message) as caught:
        async with serving_process(app, **options):
            raise AssertionError("the body ran")
    notes = getattr(caught.value, "__notes__", [])
    if note is not None:
        assert notes[0].startswith("In the child process:\nTraceback")
        assert note in notes[0]
    assert capfd.readouterr().err == ""


async def test_busy_port_is_an_os_error_in_the_parent() -> None:
    """No child is started."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}.*in use"):
            async with serving_process(TALKING, port=port):
                raise AssertionError("the body ran")


async def test_missing_certificate_is_an_os_error_in_the_parent() -> None:
    """It names the file."""
    with pytest.raises(FileNotFoundError) as caught:
        async with serving_process(TALKING, ssl_certfile="/nowhere"):
            raise AssertionError("the body ran")
    assert caught.value.filename == "/nowhere"


async def test_option_that_only_the_child_can_check_is_an_error_in_the_parent() -> None:
    """Here: an invalid configuration for logging."""
    with pytest.raises(ValueError, match="dictionary doesn't specify a version"):
        async with serving_process(TALKING, log_config={}):
            raise AssertionError("the body ran")


@pytest.mark.parametrize("app", ["tests.helpers.children:hanging", "tests.helpers.blocking_module:app"])
async def test_start_of_a_child_that_exceeds_the_startup_timeout_is_given_up(app: str) -> None:
    """The import counts as well, since it blocks no loop of the parent."""
    with pytest.raises(StartupTimeoutError, match=r"within startup_timeout=1\.5 seconds") as caught:
        async with serving_process(app, startup_timeout=1.5):
            raise AssertionError("the body ran")
    assert isinstance(caught.value.__cause__, TimeoutError)


@pytest.mark.parametrize("app", ["tests.helpers.children:hanging", "tests.helpers.blocking_module:app"])
async def test_child_that_is_killed_during_its_start_is_a_startup_error(
    app: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error says so."""

    async def kill() -> None:
        while not children():
            await asyncio.sleep(0.001)
        os.kill(children()[0], signal.SIGKILL)

    killing = asyncio.create_task(kill())
    with pytest.raises(StartupError, match=r"ended \(killed by SIGKILL\) before the app had started"):
        async with serving_process(app):
            raise AssertionError("the body ran")
    await killing


async def test_cancelled_start_ends_the_child() -> None:
    """And waits for its end."""
    app = "tests.helpers.children:hanging"
    with anyio.move_on_after(0.5) as scope:
        async with serving_process(app):
            raise AssertionError("the body ran")
    assert scope.cancelled_caught
    assert children() == []


@pytest.mark.parametrize(
    ("app", "options", "message"),
    [
        (App(), {}, "must be an import string"),
        (uvicorn.Config(TALKING, log_config=None), {}, "must be an import string"),
        ("__main__:app", {}, "which has another __main__"),
        (TALKING, {"ssl": ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)}, "ssl=.* it is an object of this one"),
        (TALKING, {"http": asyncio.Protocol}, "http=.* cannot be passed to another process"),
        (TALKING, {"workers": 2}, "no worker processes"),
        (TALKING, {"prot": 2}, "did you mean 'port'"),
        (TALKING, {"log_level": 1.5}, "log_level"),
    ],
)
async def test_argument_that_cannot_be_passed_to_another_process_is_refused(
    app: Any, options: Any, message: str
) -> None:
    """Before anything starts."""
    with pytest.raises(TypeError, match=message):
        async with serving_process(app, **options):
            raise AssertionError("the body ran")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"frozen": True}, "this program is frozen"),
        ({"frozen": "macosx_app"}, "this program is frozen"),
        ({"executable": ""}, "sys.executable is empty"),
        ({"executable": None}, "sys.executable is empty"),
        ({"executable": "/nowhere/python"}, "sys.executable is '/nowhere/python', which is not a Python interpreter"),
        ({"executable": "/bin/sh", "orig_argv": []}, "sys.executable is '/bin/sh', which is not"),
        ({"executable": "/bin/sh", "orig_argv": ["sh", "-v"], "argv": ["sh"]}, "sys.executable is '/bin/sh'"),
    ],
)
async def test_program_that_has_no_interpreter_is_refused(
    attributes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a program would start itself, and that one again itself, and so on. Nothing is started."""
    for name, value in attributes.items():
        monkeypatch.setattr(sys, name, value, raising=False)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(RuntimeError, match=message):
        async with serving_process(TALKING):
            raise AssertionError("the body ran")


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, "sleep") for name in ("python", "python3.13", "python3.13d", "python3-dbg", "Python", "pypy3")]
    + [("worker", "python3"), ("mayapy", "sleep")],
)
def test_no_interpreter_is_taken_for_another_program(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is called: it was started with a command line of Python's."""
    (tmp_path / target).write_text("")
    (tmp_path / target).chmod(0o755)
    if not (tmp_path / name).exists():
        (tmp_path / name).symlink_to(tmp_path / target)
    monkeypatch.setattr(sys, "executable", str(tmp_path / name))
    if name != "mayapy":
        monkeypatch.setattr(sys, "orig_argv", [])
    spawn.check_interpreter()


def test_unknown_error_of_a_child_is_a_serving_error() -> None:
    """The child could have another version of aioserve."""
    sent = {"type": "NewError", "message": "something new", "errno": None, "filename": None, "traceback": ""}
    error = messages.decode_error(sent)
    assert type(error) is ServingError
    assert str(error) == "something new"
