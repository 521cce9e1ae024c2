"""
Who may connect to a Unix socket: its mode, whatever the umask is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aioserve import serving, start
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.privileges import unprivileged
from tests.helpers.processes import linux_only
from tests.helpers.programs import Program

pytestmark = not_portable.unix_sockets

PR_SET_DUMPABLE = 4  # of sys/prctl.h


@pytest.fixture(params=[0, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mode", [None, 0o600, 0o660, 0o666, 0o622, 0], ids=str)
async def test_unix_socket_never_has_more_permissions_than_uds_mode(
    mode: int | None, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the umask is: from the moment that it exists; and it has exactly these when it appears at the path."""
    seen: dict[str, tuple[int, int, bool]] = {}

    def watch(name: str) -> None:
        method = getattr(socket.socket, name)

        def watched(sock: socket.socket, *args: Any) -> Any:
            result = method(sock, *args)
            (directory,) = tmp_path.iterdir()
            (file,) = directory.iterdir()
            modes = [stat.S_IMODE(each.lstat().st_mode) for each in (directory, file)]
            seen[name] = (modes[0], modes[1], os.path.lexists(path))
            return result

        monkeypatch.setattr(socket.socket, name, watched, raising=False)

    watch("bind")
    watch("listen")
    options: dict[str, Any] = {} if mode is None else {"uds_mode": mode}
    server = await start(App(), uds=path, **options)
    monkeypatch.undo()
    when_open = stat.S_IMODE(os.lstat(path).st_mode)
    await server.aclose()

    asked = 0o600 if mode is None else mode
    assert seen["bind"][1] & ~asked == 0
    assert seen["bind"][0] & 0o077 == 0
    assert seen["listen"] == (seen["bind"][0], asked, False)
    assert when_open == asked


@linux_only
@pytest.mark.parametrize("bits", [0o177, 0o111, 0o700, 0o777], ids=oct)
async def test_umask_that_takes_rights_of_the_owner_does_not_prevent_a_start(bits: int) -> None:
    """`umask(0o177)` is usual for sockets; root would not notice it."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)  # noqa: S103
        path = f"{directory}/app.sock"
        with unprivileged():
            ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)  # so that /proc/self is this user's as well
            before = os.umask(bits)
            try:
                server = await start(App(), uds=path)
            finally:
                os.umask(before)
            mode = stat.S_IMODE(os.lstat(path).st_mode)
            await server.aclose()
        assert mode == 0o600
        assert os.listdir(directory) == []


async def test_other_users_cannot_connect_to_a_unix_socket_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike to a port of the loopback."""
    if os.geteuid() != 0:
        pytest.skip("only root can run code as another user")
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as other:
        os.chmod(directory, 0o755)  # noqa: S103
        path = f"{directory}/app.sock"
        async with serving(App(), uds=path):
            with unprivileged(), pytest.raises(PermissionError):
                other.connect(path)
        async with serving(App(), uds=path, uds_mode=0o666):
            with unprivileged():
                other.connect(path)


PRIVILEGED = """
import asyncio, os, sys
from aioserve import serving
from tests.helpers.apps import App

async def main():
    async with serving(App(), uds=sys.argv[1]):
        print("serving")

os.setreuid(65534, 0)
asyncio.run(main())
"""


def test_rights_of_the_effective_user_count(tmp_path: Path) -> None:
    """Here the real one may not write in the directory."""
    if os.geteuid() != 0:
        pytest.skip("only root can run code as another user")
    tmp_path.chmod(0o755)
    with Program("-c", PRIVILEGED, str(tmp_path / "app.sock")) as program:
        code, err = program.end()
    assert (code, program.said, err) == (0, ["serving"], "")


@pytest.mark.parametrize("moment", ["mkdir", "bind", "listen"])
async def test_private_directory_that_another_program_replaces_is_not_used(
    moment: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is linked there keeps its mode, also where that program may write in the socket's directory."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)

    def replace() -> None:
        (private,) = (each for each in tmp_path.iterdir() if each.name.startswith("."))
        private.rename(tmp_path / "moved")
        private.mkdir()
        private.chmod(0o777)
        os.link(victim, private / "app.sock")

    owner = os if moment == "mkdir" else socket.socket
    method = getattr(owner, moment)

    def replaced(*args: Any) -> None:
        method(*args)
        if moment != "mkdir" or os.path.dirname(args[0]) == str(tmp_path):
            monkeypatch.undo()
            replace()

    umask = os.umask(0o077)
    try:
        monkeypatch.setattr(owner, moment, replaced, raising=False)
        if moment == "mkdir":
            with pytest.raises(PermissionError, match="cannot make a directory beside it that nobody else can enter"):
                await start(App(), uds=path, uds_mode=0o666)
        else:
            async with serving(App(), uds=path, uds_mode=0o666):
                assert stat.S_IMODE(os.lstat(path).st_mode) == 0o666
    finally:
        os.umask(umask)
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert not os.path.lexists(path)


ATTACKER = """
import os, sys
from contextlib import suppress
directory, victim = sys.argv[1:]
path = os.path.join(directory, "app.sock")
print("ready", flush=True)
while os.getppid() == int(os.environ["STARTER"]):
    for name in os.listdir(directory):
        with suppress(OSError):
            if name == "app.sock":  # a socket that has just appeared
                os.unlink(path)
                os.link(victim, path)
                for _ in range(50):
                    os.stat(path)  # long enough for a chmod()
                os.unlink(path)
            elif name.startswith(".") and int(name[1:], 16) % 2:  # leaves half of the starts alone until then
                private = os.path.join(directory, name)
                os.rename(private, os.path.join(directory, "moved" + name))
                os.mkdir(private)
                os.chmod(private, 0o777)
                os.link(victim, os.path.join(private, "app.sock"))
"""


async def test_hard_link_that_an_attacker_puts_at_the_path_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attacker may write in the directory, and tries it all the time."""
    directory, victim = tmp_path / "hostile", tmp_path / "victim"
    directory.mkdir()
    victim.write_text("precious")
    victim.chmod(0o600)
    chmod = os.chmod

    def chmod_late(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.001)  # the attacker is slower than we are
        chmod(*args, **kwargs)

    monkeypatch.setattr(os, "chmod", chmod_late)
    umask = os.umask(0o077)
    attacker = subprocess.Popen(  # noqa: ASYNC220, S603
        [sys.executable, "-c", ATTACKER, directory, victim],
        stdout=subprocess.PIPE,
        env={**os.environ, "STARTER": str(os.getpid())},
    )
    with attacker:
        try:
            assert attacker.stdout is not None
            assert attacker.stdout.readline() == b"ready\n"
            for _ in range(200):
                with contextlib.suppress(OSError):
                    await (await start(App(), uds=directory / "app.sock", uds_mode=0o666)).aclose()
                assert stat.S_IMODE(victim.stat().st_mode) == 0o600
            assert attacker.poll() is None
        finally:
            attacker.kill()
            os.umask(umask)
