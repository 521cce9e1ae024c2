"""
Two hundred stops with HTTP/2, each with fifty streams in flight from another process: none is lost.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme

from aioserve import _limits, serving, start
from tests.helpers.http2 import needs_http2
from tests.helpers.programs import ROOT
from tests.helpers.restarting import Counting

STREAMS = 50
STOPS = 200

pytestmark = [needs_http2, pytest.mark.timeout(300)]


class Busy(Counting):
    """An app whose handlers take some turns of the loop, and some of them longer."""

    count = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.count += 1
            await asyncio.sleep(self.count % 7 / 1000)
        await super().__call__(scope, receive, send)


async def stop_under_load(
    stops: int, kind: str, certificate: str | None = None, streams: int = STREAMS, **options: Any
) -> dict[str, int]:
    """Stop the server again and again, each time with some streams in flight; return what the client has counted."""
    app = Busy()
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as lent, ThreadPoolExecutor(1) as executor:
        arguments = [str(lent.getsockname()[1]), str(streams), kind, *([certificate] if certificate else [])]
        command = [sys.executable, "-m", "tests.helpers.http2_load", *arguments]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: ASYNC220, S603
            assert process.stdin is not None
            assert process.stdout is not None
            for number in range(stops):
                async with serving(app, http2=True, sockets=[lent], **options) as server:
                    await app.answers(1 + (number * 7) % (2 * streams))
                assert server.report is not None
                assert not server.report.was_forced
            last = await start(app, http2=True, sockets=[lent], **options)
            process.stdin.close()
            output = await asyncio.get_running_loop().run_in_executor(executor, process.stdout.read)
        await last.aclose()
    counts: dict[str, int] = json.loads(output)
    print(kind, certificate, counts)
    return counts


def check(counts: dict[str, int], stops: int) -> None:
    assert counts["connections"] > stops / 2
    assert counts["answered"] >= stops
    assert [counts[name] for name in ("lost", "other", "contradicted", "reset")] == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["waves", "steady"])
async def test_two_hundred_stops_lose_no_stream(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is never without a stream is told so sooner than usual, or this would take minutes."""
    monkeypatch.setattr(_limits, "HTTP2_STREAMS", 0.05)
    check(await stop_under_load(STOPS, kind), STOPS)


@pytest.mark.parametrize("kind", ["waves", "steady"])
async def test_stops_with_tls_lose_no_stream(
    kind: str, authority: trustme.CA, tls: tuple[dict[str, Any], ssl.SSLContext], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(_limits, "HTTP2_STREAMS", 0.05)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    check(await stop_under_load(STOPS // 4, kind, str(tmp_path / "authority.pem"), **tls[0]), STOPS // 4)


async def test_client_that_is_never_without_a_stream_is_told_within_a_second() -> None:
    # zttp 0.0.35 ends a connection of which it has read 4096 streams, with answers in flight.
    check(await stop_under_load(3, "steady", streams=3), 3)
