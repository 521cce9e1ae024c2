"""
Sign in with OAuth 2 from a terminal: open the browser, wait for the redirect, and print the tokens as JSON.

    pip install httpx starlette
    python oauth.py --authorize-url https://example.com/authorize --token-url https://example.com/token --client-id ID

Each option can be an environment variable, too: OAUTH_TOKEN_URL for --token-url. A client secret, if the provider
requires one, is read from OAUTH_CLIENT_SECRET only. The provider has to know the redirect URIs: by default
http://127.0.0.1:8400/callback and the same with 8401 and 8402.

Exit codes: 0 the tokens are printed; 1 the sign-in failed; 2 the command line is wrong; 130 Ctrl+C.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import hashlib
import json
import os
import secrets
import sys
import threading
import webbrowser
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from aioserve import Server, start

PAGE = "<!doctype html><title>{0}</title><h1>{0}</h1><p>You can close this window, and go back to the terminal.</p>"


class SignInError(Exception):
    """The provider, or the user, did not let us in."""


async def start_on_one_of(ports: Sequence[int], app: Starlette) -> Server:
    """Start a server on the first port that no other program uses."""
    for port in ports:
        try:
            return await start(app, port=port)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
    raise SignInError(f"the ports {', '.join(map(str, ports))} are in use")


async def sign_in(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the provider's token URL answers."""
    state = secrets.token_urlsafe()
    verifier = secrets.token_urlsafe(64)
    challenge = urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
    redirected: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()

    async def callback(request: Request) -> Response:
        found = dict(request.query_params)
        if not secrets.compare_digest(found.get("state", "").encode(), state.encode()):
            return HTMLResponse(PAGE.format("This is not the sign-in that was begun"), 400)  # and go on waiting
        if not redirected.done():  # the user may reload the page
            redirected.set_result(found)
        return HTMLResponse(PAGE.format("Sign-in refused" if "error" in found else "Signed in"))

    app = Starlette(routes=[Route("/callback", callback)])
    async with await start_on_one_of(options.port, app) as server:
        redirect_uri = f"{server.url}/callback"
        query = {
            "response_type": "code",
            "client_id": options.client_id,
            "redirect_uri": redirect_uri,
            "scope": options.scope,
            "state": state,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        url = f"{options.authorize_url}{'&' if '?' in options.authorize_url else '?'}{urlencode(query)}"
        print(f"Sign in with your browser. If none opens, go to\n{url}", file=sys.stderr)
        # In a thread, since a browser in the terminal returns when it is left; and Ctrl+C does not wait for it.
        threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()
        async with asyncio.timeout(options.timeout):
            found = await redirected
    # Here the browser has the whole page, and the port is free.

    if "code" not in found:
        raise SignInError(found.get("error_description") or found.get("error") or "the provider sent no code")
    form = {
        "grant_type": "authorization_code",
        "code": found["code"],
        "redirect_uri": redirect_uri,
        "client_id": options.client_id,
        "code_verifier": verifier,
    }
    if secret := os.environ.get("OAUTH_CLIENT_SECRET"):
        form["client_secret"] = secret
    async with httpx.AsyncClient(headers={"accept": "application/json"}) as client:
        response = await client.post(options.token_url, data=form)
    if response.is_error:
        raise SignInError(f"{options.token_url} answered {response.status_code}: {response.text}")
    tokens: dict[str, Any] = response.json()
    if "error" in tokens:  # some providers say so with a status of 200
        raise SignInError(tokens.get("error_description") or tokens["error"])
    return tokens


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sign in with OAuth 2, and print the tokens as JSON.")

    def add(name: str, default: str | None, text: str, **more: Any) -> None:
        found = os.environ.get(f"OAUTH_{name.upper().replace('-', '_')}", default)
        parser.add_argument(f"--{name}", default=found, required=found is None, help=text, **more)

    def ports(text: str) -> list[int]:
        return [int(port) for port in text.split(",")]

    add("authorize-url", None, "where the user signs in", metavar="URL")
    add("token-url", None, "where the code is exchanged for tokens", metavar="URL")
    add("client-id", None, "the name of this program at the provider", metavar="ID")
    add("scope", "openid", "what is asked for (default: openid)")
    add("port", "8400,8401,8402", "the ports of the redirect URIs (default: 8400,8401,8402)", type=ports)
    add("timeout", "300", "how many seconds the user has (default: 300)", type=float)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        tokens = asyncio.run(sign_in(options))
    except KeyboardInterrupt:
        return 130
    except TimeoutError:
        print(f"Nobody has signed in within {options.timeout:g} seconds.", file=sys.stderr)
        return 1
    except (SignInError, httpx.HTTPError, OSError, ValueError) as exc:
        print(f"The sign-in failed: {exc}", file=sys.stderr)
        return 1
    json.dump(tokens, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
