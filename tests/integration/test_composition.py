"""
The whole program of the examples: a bot, a worker, a scheduler, an API and metrics, which end together.

Redis and the bot are real ones; Telegram is a server of the test.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest
import redis
from anyio.to_thread import run_sync

from aioserve import serving
from tests.helpers.programs import Program
from tests.integration import examples
from tests.integration.conftest import program
from tests.integration.telegram import CHAT, TOKEN, Telegram

pytestmark = [
    pytest.mark.parametrize("loop_name", ["asyncio"]),  # the program chooses its own
    pytest.mark.timeout(180),  # it imports many modules, and is started several times
]

# What the program's parts log at their end.
BOT = "INFO:telegram.ext.Application:Application.stop() complete"
SCHEDULER = "INFO:apscheduler.scheduler:Scheduler has been shut down"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    """Run an empty Redis for the program and the test."""
    path = tmp_path / "redis.sock"
    command = [program("redis-server", "redis-server"), "--port", "0", "--unixsocket", str(path), "--save", ""]
    with subprocess.Popen([*command, "--dir", str(tmp_path)], stdout=subprocess.PIPE, text=True) as server:  # noqa: S603
        try:
            assert server.stdout is not None
            while "ready to accept connections" not in (line := server.stdout.readline()):
                assert line, "it has not started"
            monkeypatch.setenv("REDIS_URL", f"unix://{path}")
            with closing(redis.Redis(unix_socket_path=str(path), decode_responses=True)) as client:
                yield client
        finally:
            server.terminate()
            server.communicate()


@pytest.fixture
async def telegram(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Telegram]:
    telegram = Telegram()
    async with serving(telegram.app) as server:
        monkeypatch.setenv("BOT_API", f"{server.url}/bot")
        monkeypatch.setenv("BOT_TOKEN", TOKEN)
        yield telegram


class Running:
    """The program, with all of its parts running."""

    def __init__(self, program: Program, metrics: str, api: str) -> None:
        self.program = program
        self.metrics = metrics
        self.api = api

    async def wait_for(self, line: str) -> None:
        """Wait until it has printed a line with this beginning."""
        await run_sync(self.program.wait_for, line)

    async def end(self) -> tuple[int, str]:
        return await run_sync(self.program.end)

    def ends(self) -> list[str]:
        """Return which of its parts have logged that they have ended."""
        closed = "INFO:uvicorn.error:Closed "
        ends = {BOT: "bot", SCHEDULER: "scheduler", closed + self.api: "API", closed + self.metrics: "metrics"}
        return [ends[line] for line in self.program.said if line in ends]


@asynccontextmanager
async def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    monkeypatch.setenv("PORT", "0")
    monkeypatch.setenv("METRICS_PORT", "0")
    script = tmp_path / "program.py"
    script.write_text((examples.EXAMPLES / "program.py").read_text(encoding="utf-8"))
    with Program(str(script)) as program:
        serving = "INFO:uvicorn.error:Uvicorn running on "
        urls = [(await run_sync(program.wait_for, serving)).removeprefix(serving) for _ in range(2)]
        await run_sync(program.wait_for, "INFO:telegram.ext.Application:Application started")
        yield Running(program, *urls)
    for url in urls:
        assert not listens(url)


def listens(url: str) -> bool:
    """Return whether a connection can be made."""
    where = urlsplit(url)
    try:
        socket.create_connection((str(where.hostname), int(where.port or 0))).close()
    except ConnectionRefusedError:
        return False
    return True


class Posting:
    """A request whose body is incomplete, and whose handler waits for the rest."""

    def __init__(self, url: str, job: dict[str, Any]) -> None:
        self.body = json.dumps(job).encode()
        where = urlsplit(url)
        self.sock = socket.create_connection((str(where.hostname), int(where.port or 0)))
        head = "POST /jobs HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n"
        self.sock.sendall(f"{head}content-length: {len(self.body)}\r\n\r\n".encode())
        self.file = self.sock.makefile("rb")
        assert (self.file.readline(), self.file.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
        self.sock.sendall(self.body[:5])

    def finish(self) -> bytes:
        """Send the rest; return the whole response."""
        self.sock.sendall(self.body[5:])
        return self.file.read()


@contextmanager
def posting(url: str, job: dict[str, Any]) -> Iterator[Posting]:
    begun = Posting(url, job)
    with begun.sock, begun.file:
        yield begun


def texts(store: redis.Redis) -> list[str]:
    """Return the jobs that are queued."""
    jobs: Any = store.xrange("jobs")
    return [fields["text"] for _, fields in jobs]


def in_work(store: redis.Redis) -> list[str]:
    """Return how often each job was begun without being acknowledged."""
    pending: Any = store.xpending_range("jobs", "workers", "-", "+", 10)
    jobs: dict[str, dict[str, str]] = dict(cast(Any, store.xrange("jobs")))
    return [jobs[each["message_id"]]["text"] for each in pending]


async def test_program_that_is_stopped_during_its_work_loses_nothing(
    store: redis.Redis, telegram: Telegram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The job in work is finished and acknowledged, what waits behind it stays, the response in flight is sent; all parts
    end, the metrics last. And the next run does what is left.
    """
    async with running(tmp_path, monkeypatch) as it, httpx.AsyncClient(trust_env=False) as client:
        telegram.say("paint")
        assert await telegram.next_message() == "done: paint"  # and it waits for the answer
        assert (await client.post(f"{it.api}/jobs", json={"chat": CHAT, "text": "varnish"})).status_code == 202
        with posting(it.api, {"chat": CHAT, "text": "polish"}) as request:
            it.program.send(signal.SIGTERM)
            await it.wait_for("INFO:aioserve:SIGTERM: cancelling")
            # The API still answers, also on new connections.
            assert (await client.post(f"{it.api}/jobs", json={"chat": CHAT, "text": "wax"})).status_code == 202
            assert texts(store) == ["paint", "varnish", "wax"]
            assert in_work(store) == ["paint"]

            telegram.accepting.set()
            await it.wait_for(SCHEDULER)
            assert texts(store) == ["varnish", "wax"]
            while await run_sync(listens, it.api):
                pass
            metrics = (await client.get(f"{it.metrics}/metrics")).text
            assert "\njobs_done_total 1.0\n" in metrics
            response = await run_sync(request.finish)
        assert re.search(rb'^HTTP/1.1 202 .*\r\nconnection: close\r\n.*"\d+-\d"$', response, flags=re.DOTALL)
        assert await it.end() == (0, "")
        assert it.ends() == ["bot", "scheduler", "API", "metrics"]
    assert texts(store) == ["varnish", "wax", "polish"]
    assert in_work(store) == []

    async with running(tmp_path, monkeypatch) as it:
        left = [await telegram.next_message() for _ in range(3)]
        assert left == ["done: varnish", "done: wax", "done: polish"]
        it.program.send(signal.SIGTERM)
        assert await it.end() == (0, "")
    assert telegram.sent == ["done: paint", *left]
    assert texts(store) == in_work(store) == []


async def test_part_of_the_program_that_fails_ends_the_others_in_order(
    store: redis.Redis, telegram: Telegram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its very exception comes out, and nothing else; the job is still there, and done at the next start."""
    telegram.refusing = True
    async with running(tmp_path, monkeypatch) as it:
        telegram.say("paint")
        assert await telegram.next_message() == "done: paint"
        code, err = await it.end()
        assert code == 1
        assert it.ends() == ["bot", "scheduler", "API", "metrics"]
    assert err.count("Traceback (most recent call last):") == 1
    assert err.endswith("\ntelegram.error.BadRequest: Chat not found\n")
    assert texts(store) == in_work(store) == ["paint"]

    telegram.refusing = False
    telegram.accepting.set()
    async with running(tmp_path, monkeypatch) as it:
        assert await telegram.next_message() == "done: paint"
        it.program.send(signal.SIGTERM)
        assert await it.end() == (0, "")
    assert telegram.sent == ["done: paint"]
    assert texts(store) == in_work(store) == []


async def test_scheduler_of_the_program_runs(
    store: redis.Redis, telegram: Telegram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has counted can be read where the metrics are."""
    async with running(tmp_path, monkeypatch) as it, httpx.AsyncClient(trust_env=False) as client:
        for text in ("paint", "varnish"):
            await client.post(f"{it.api}/jobs", json={"chat": CHAT, "text": text})
        await telegram.next_message()
        await it.wait_for('INFO:apscheduler.executors.default:Job "count')
        assert "\njobs_waiting 2.0\n" in (await client.get(f"{it.metrics}/metrics")).text
        telegram.accepting.set()
        it.program.send(signal.SIGTERM)
        assert await it.end() == (0, "")
