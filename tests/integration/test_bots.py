"""
The bots of the documentation: each starts its web server, and stops it before the bot is gone.

They are the libraries' own bots; Telegram and Discord are servers of the test.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from aioserve import serving
from tests.helpers.pages import Page
from tests.helpers.programs import Program
from tests.helpers.threads import in_thread
from tests.integration import examples
from tests.integration.discord_api import Discord
from tests.integration.telegram import CHAT, TOKEN, Telegram

pytestmark = [
    pytest.mark.parametrize("loop_name", ["asyncio"]),  # the programs choose their own
    pytest.mark.timeout(120),  # they import many modules
]

PAGE = Page("docs/guides/bots.md")
SERVING = "INFO:uvicorn.error:Uvicorn running on "

# What the libraries log when the bot hears its users.
ONLINE = {
    "aiogram": "INFO:aiogram.dispatcher:Run polling for bot @bot",
    "discord": "INFO:discord.gateway:Shard ID None has connected to Gateway",
    "telegram": "INFO:telegram.ext.Application:Application started",
}


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOT_TOKEN", TOKEN)


@asynccontextmanager
async def running(
    library: str, kind: str, api: Telegram | Discord, tmp_path: Path
) -> AsyncIterator[tuple[Program, str]]:
    """Run a program of the page until its bot is online; give its server's URL."""
    script = tmp_path / "program.py"
    code = PAGE.files()[f"{library}_{kind}.py"]
    assert "port=8000" in code
    script.write_text(code.replace("port=8000", "port=0"))
    async with serving(api.app) as there:
        arguments = ("-m", "tests.integration.elsewhere", library, there.url, str(script))
        with Program(*arguments, warnings_are_errors=False) as program:
            # The hook of aiogram and of discord.py runs before the bot is online, as a block does.
            url = (await in_thread(partial(program.wait_for, SERVING))).removeprefix(SERVING)
            await in_thread(partial(program.wait_for, ONLINE[library]))
            yield program, url


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("library", "path"), [("aiogram", f"/chats/{CHAT}"), ("telegram", f"/chats/{CHAT}"), ("discord", "/channels/5")]
)
async def test_bot_that_is_stopped_still_sends_what_the_last_request_asks_for(
    library: str, path: str, signum: int, tmp_path: Path
) -> None:
    """The server answers it while the bot can still be used; then the bot ends, with nothing else to say."""
    api = Discord() if library == "discord" else Telegram()
    async with running(library, "bot", api, tmp_path) as (program, url), httpx.AsyncClient(trust_env=False) as client:
        asking = asyncio.create_task(client.post(url + path, params={"text": "last"}))
        assert await api.next_message() == "last"
        program.send(signum)
        while (await in_thread(partial(refuses, url))) is False:
            pass
        assert not asking.done()
        api.accepting.set()
        assert (await asking).json() > 0
        assert await in_thread(program.end) == (0, "")
        assert f"INFO:uvicorn.error:Closed {url}" in program.said
        if isinstance(api, Discord):
            assert api.disconnected == [1000]


@pytest.mark.parametrize("library", ["aiogram", "telegram"])
async def test_bot_hears_and_answers_beside_its_server(library: str, tmp_path: Path) -> None:
    api = Telegram()
    api.accepting.set()
    async with running(library, "bot", api, tmp_path) as (program, _):
        api.say("hi")
        assert await api.next_message() == "hello"
        program.send(signal.SIGTERM)
        assert await in_thread(program.end) == (0, "")


@pytest.mark.parametrize("library", ["aiogram", "telegram", "discord"])
async def test_hooks_of_a_bot_start_and_stop_its_server(library: str, tmp_path: Path) -> None:
    """The library's own `run()` calls them, and Ctrl+C ends both."""
    api = Discord() if library == "discord" else Telegram()
    async with running(library, "hooks", api, tmp_path) as (program, url), httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(url)).status_code == 404
        program.send(signal.SIGINT)
        code, err = await in_thread(program.end)
        assert code == 0
        assert "Traceback" not in err
        assert f"INFO:uvicorn.error:Closed {url}" in program.said


async def test_example_of_a_bot_shows_its_chats_and_writes_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that Telegram refuses is a 502; the last one is still sent in a stop."""
    api = Telegram()
    monkeypatch.setenv("PORT", "0")
    async with serving(api.app) as there, httpx.AsyncClient(trust_env=False) as client:
        monkeypatch.setenv("BOT_API", there.url)
        with Program(str(examples.EXAMPLES / "bot.py"), warnings_are_errors=False) as program:
            url = (await in_thread(partial(program.wait_for, SERVING))).removeprefix(SERVING)
            await in_thread(partial(program.wait_for, ONLINE["aiogram"]))
            assert "None yet" in (await client.get(url)).text
            api.say("<b>hi</b>")
            assert await api.next_message() == "You are number 1."
            assert f"<li>{CHAT}: &lt;b&gt;hi&lt;/b&gt;" in (await client.get(url)).text

            api.refusing = True
            refused = await client.post(f"{url}/chats/{CHAT}", json={"text": "no"})
            assert (refused.status_code, "chat not found" in refused.text) == (502, True)
            assert await api.next_message() == "no"

            api.refusing = False
            asking = asyncio.create_task(client.post(f"{url}/chats/{CHAT}", json={"text": "last"}))
            assert await api.next_message() == "last"
            program.send(signal.SIGTERM)
            while (await in_thread(partial(refuses, url))) is False:
                pass
            api.accepting.set()
            assert (await asking).status_code == 200
            assert await in_thread(program.end) == (0, "")


def refuses(url: str) -> bool:
    """Return whether nobody listens there any more."""
    try:
        httpx.get(url, trust_env=False, timeout=5, headers={"connection": "close"})
    except httpx.TransportError:
        return True
    return False
