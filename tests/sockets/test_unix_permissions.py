"""
Who may connect to a Unix socket: its mode, whatever the umask is.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aioserve import serving, start
from tests.helpers.apps import App
from tests.helpers.privileges import unprivileged


@pytest.fixture(params=[0, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mode", [None, 0o600, 0o660, 0o666, 0o622, 0], ids=str)
async def test_unix_socket_never_has_more_permissions_than_uds_mode(
    mode: int | None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the umask is: from the moment that it exists; and it has exactly these when clients can connect."""
    seen: list[tuple[str, int]] = []

    def watch(name: str) -> None:
        method = getattr(socket.socket, name)

        def watched(sock: socket.socket, *args: Any) -> Any:
            result = method(sock, *args)
            seen.append((name, stat.S_IMODE(os.lstat(path).st_mode)))
            return result

        monkeypatch.setattr(socket.socket, name, watched, raising=False)

    watch("bind")
    watch("listen")
    options: dict[str, Any] = {} if mode is None else {"uds_mode": mode}
    server = await start(App(), uds=path, **options)
    monkeypatch.undo()
    await server.aclose()

    asked = 0o600 if mode is None else mode
    (_, when_bound), (_, when_open) = seen
    assert when_bound & ~asked == 0
    assert when_open == asked


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


@pytest.mark.parametrize("moment", ["bind", "chmod"])
async def test_symbolic_link_that_replaces_the_unix_socket_is_not_followed(
    moment: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its target keeps its mode, and the link is not removed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)

    def replace() -> None:
        os.unlink(path)
        os.symlink(victim, path)

    bind, chmod = socket.socket.bind, os.chmod

    def replaced_after_bind(sock: socket.socket, address: Any) -> None:
        bind(sock, address)
        replace()

    def replaced_before_chmod(*args: Any, **kwargs: Any) -> None:
        replace()
        chmod(*args, **kwargs)

    if moment == "bind":
        monkeypatch.setattr(socket.socket, "bind", replaced_after_bind, raising=False)
    else:
        monkeypatch.setattr(os, "chmod", replaced_before_chmod)
    with pytest.raises(OSError, match=f"cannot listen on {path}: "):
        await start(App(), uds=path, uds_mode=0o666)
    monkeypatch.undo()
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert os.path.islink(path)
