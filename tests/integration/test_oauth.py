"""
The OAuth tool of the examples, run as a command: the provider and the browser are programs of the test.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import socket
import sys
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from aioserve import serving
from tests.helpers.programs import Program
from tests.helpers.threads import in_thread
from tests.integration import examples
from tests.integration.conftest import free_port

pytestmark = [
    pytest.mark.parametrize("loop_name", ["asyncio"]),  # the program chooses its own
]

TOKENS = {"access_token": "secret", "token_type": "bearer"}
PAGE = "<!doctype html><title>{0}</title><h1>{0}</h1><p>You can close this window, and go back to the terminal.</p>"
ASKED = "Sign in with your browser. If none opens, go to\n"

# It writes what it shows into a file; with a state, it first visits the redirect URI with that.
BROWSER = """
import sys
from urllib.parse import parse_qs, urlsplit
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

open_url = build_opener(ProxyHandler({})).open

def visit(url):
    try:
        with open_url(url, timeout=20) as answer:
            return f"{answer.status} {answer.read().decode()}"
    except HTTPError as exc:
        with exc:
            return f"{exc.status} {exc.read().decode()}"

_, file, state, url = sys.argv
shown = []
if state:
    shown.append(visit(parse_qs(urlsplit(url).query)["redirect_uri"][0] + "?code=theirs&state=" + state))
shown.append(visit(url))
with open(file, "w") as log:
    log.write("\\n".join(shown))
"""

# It is open, and shows nothing.
STUCK = "sh -c '{} exec sleep 30 > /dev/null 2>&1' %s"


class Provider:
    """It lets everybody in, or refuses everybody, and checks what the tool has to prove."""

    def __init__(self) -> None:
        self.error = ""
        self.asked: dict[str, str] = {}
        self.exchanged: list[dict[str, str]] = []
        self.answer: tuple[Any, int] = (TOKENS, 200)
        routes = [Route("/authorize", self.authorize), Route("/token", self.token, methods=["POST"])]
        self.app = Starlette(routes=routes)

    async def authorize(self, request: Request) -> Response:
        self.asked = dict(request.query_params)
        found = {"error": "access_denied", "error_description": self.error} if self.error else {"code": "a code"}
        url = request.url.replace(query="").include_query_params(**found, state=self.asked["state"])
        return RedirectResponse(f"{self.asked['redirect_uri']}?{url.query}")

    async def token(self, request: Request) -> Response:
        async with request.form() as form:
            self.exchanged.append({name: str(value) for name, value in form.items()})
        return JSONResponse(*self.answer)


class Tool:
    """The command, its provider, and what its browser has shown."""

    def __init__(self, provider: Provider, url: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.provider = provider
        self.url = url
        self._shown = directory / "shown"
        self._script = directory / "browser.py"
        self._script.write_text(BROWSER)
        self._monkeypatch = monkeypatch
        self.browse()

    def browse(self, state: str = "") -> None:
        """Let the browser visit the page, after a visit with this state."""
        command = shlex.join([sys.executable, str(self._script), str(self._shown), state])
        self._monkeypatch.setenv("BROWSER", f"{command} %s")

    def command(self, *options: str) -> Program:
        provider = ["--authorize-url", f"{self.url}/authorize", "--token-url", f"{self.url}/token"]
        return Program(str(examples.EXAMPLES / "oauth.py"), *provider, "--client-id", "tool", *options)

    async def run(self, *options: str) -> tuple[int, str, str]:
        """Run the command to its end; return its exit code, and what it has printed, without the question."""
        with self.command(*options) as program:
            code, err = await in_thread(program.end)
            assert err.startswith(ASKED)
            return code, "\n".join(program.said), "\n".join(err.splitlines()[2:])

    @property
    def shown(self) -> list[str]:
        return self._shown.read_text().splitlines()


@pytest.fixture
async def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Tool]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    provider = Provider()
    async with serving(provider.app) as server:
        yield Tool(provider, server.url, tmp_path, monkeypatch)


async def test_tool_signs_in_and_prints_the_tokens(tool: Tool) -> None:
    """The browser has the whole page when the tool ends, and the provider gets what PKCE asks for."""
    port = free_port()
    assert await tool.run("--port", str(port), "--scope", "openid email") == (0, json.dumps(TOKENS, indent=2), "")
    assert tool.shown == ["200 " + PAGE.format("Signed in")]
    asked, (exchanged,) = tool.provider.asked, tool.provider.exchanged
    assert asked["scope"] == "openid email"
    assert asked["redirect_uri"] == exchanged["redirect_uri"] == f"http://127.0.0.1:{port}/callback"
    digest = hashlib.sha256(exchanged.pop("code_verifier").encode()).digest()
    assert urlsafe_b64encode(digest).decode() == asked["code_challenge"] + "="
    assert exchanged == {
        "grant_type": "authorization_code",
        "code": "a code",
        "client_id": "tool",
        "redirect_uri": asked["redirect_uri"],
    }


async def test_tool_takes_the_next_port_if_one_is_busy(tool: Tool) -> None:
    """And says which ones it has tried, if all are."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        busy, free = other.getsockname()[1], free_port()
        assert (await tool.run("--port", f"{busy},{free}"))[0] == 0
        assert tool.provider.asked["redirect_uri"] == f"http://127.0.0.1:{free}/callback"
        with tool.command("--port", str(busy)) as program:
            assert await in_thread(program.end) == (1, f"The sign-in failed: the ports {busy} are in use\n")


async def test_tool_takes_its_options_from_the_environment(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's secret can be there only."""
    found = {
        "AUTHORIZE_URL": f"{tool.url}/authorize?tenant=1",
        "TOKEN_URL": f"{tool.url}/token",
        "CLIENT_ID": "other",
        "CLIENT_SECRET": "hidden",
        "PORT": str(free_port()),
    }
    for name, value in found.items():
        monkeypatch.setenv(f"OAUTH_{name}", value)
    with Program(str(examples.EXAMPLES / "oauth.py")) as program:
        assert (await in_thread(program.end))[0] == 0
    assert tool.provider.asked["tenant"] == "1"
    assert tool.provider.exchanged[0]["client_id"] == "other"
    assert tool.provider.exchanged[0]["client_secret"] == found["CLIENT_SECRET"]


async def test_tool_answers_a_request_with_another_state_and_waits_on(tool: Tool) -> None:
    tool.browse(state="guessed")
    assert (await tool.run("--port", str(free_port())))[0] == 0
    assert tool.shown == [
        "400 " + PAGE.format("This is not the sign-in that was begun"),
        "200 " + PAGE.format("Signed in"),
    ]
    assert [form["code"] for form in tool.provider.exchanged] == ["a code"]


async def test_tool_says_why_the_user_is_not_let_in(tool: Tool) -> None:
    tool.provider.error = "You said no"
    assert await tool.run("--port", str(free_port())) == (1, "", "The sign-in failed: You said no")
    assert tool.shown == ["200 " + PAGE.format("Sign-in refused")]
    assert tool.provider.exchanged == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (({"error": "invalid_grant"}, 400), '{url}/token answered 400: {{"error":"invalid_grant"}}'),
        (({"error": "invalid_grant"}, 200), "invalid_grant"),
    ],
)
async def test_tool_says_why_the_code_is_not_exchanged(tool: Tool, answer: tuple[Any, int], said: str) -> None:
    tool.provider.answer = answer
    why = f"The sign-in failed: {said.format(url=tool.url)}"
    assert await tool.run("--port", str(free_port())) == (1, "", why)


async def test_tool_gives_up_when_nobody_signs_in(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the browser is still there."""
    monkeypatch.setenv("BROWSER", STUCK.format(""))
    options = ("--port", str(free_port()), "--timeout", "0.2")
    assert await tool.run(*options) == (1, "", "Nobody has signed in within 0.2 seconds.")


async def test_tool_ends_at_ctrl_c_without_a_traceback(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port is free again."""
    port = free_port()
    opened = tmp_path / "opened"
    os.mkfifo(opened)
    monkeypatch.setenv("BROWSER", STUCK.format(f"echo it is open > {opened};"))
    with tool.command("--port", str(port)) as program:
        assert await in_thread(opened.read_text) == "it is open\n"
        program.wait_until_asleep()
        program.send(signal.SIGINT)
        code, err = await in_thread(program.end)
    assert (code, len(err.splitlines())) == (130, 2)
    socket.create_server(("127.0.0.1", port)).close()


async def test_tool_explains_its_command_line(tool: Tool) -> None:
    with Program(str(examples.EXAMPLES / "oauth.py"), "--client-id", "tool") as program:
        code, err = await in_thread(program.end)
    assert code == 2
    assert err.endswith("the following arguments are required: --authorize-url, --token-url\n")
