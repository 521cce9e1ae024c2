"""
Flask, a WSGI app: every request has a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, request

from tests.integration.frameworks import FIRST, LAST, Play, Received, received

# How long a stream waits between two checks whether it has to end: a thread cannot be woken up.
MOMENT = 0.01


def make(play: Play) -> Flask:
    app = Flask(__name__)

    @app.get("/json")
    def as_json() -> dict[str, str]:
        return {"hello": "world"}

    @app.post("/form")
    def form() -> dict[str, Any]:
        return {"name": request.form["name"], **received(request.files["file"].read())}

    @app.post("/body")
    def body() -> Received:
        return received(request.stream.read())

    @app.get("/sync")
    def sync() -> str:
        play.hold_thread()
        return "held"

    @app.get("/stream")
    def stream() -> Response:
        def chunks() -> Iterator[bytes]:
            yield FIRST
            play.hold_thread()
            yield LAST

        return Response(chunks())

    @app.get("/events")
    def events() -> Response:
        server = request.environ["asgi.scope"]["state"]["aioserve"]

        def chunks() -> Iterator[str]:
            yield "data: hello\n\n"
            while not server.stopping.is_set():
                play.is_over(MOMENT)
            yield "data: the end\n\n"

        return Response(chunks(), mimetype="text/event-stream")

    @app.get("/endless")
    def endless() -> Response:
        def chunks() -> Iterator[str]:
            yield "data: hello\n\n"
            play.hold_thread()
            play.note("stream over")

        return Response(chunks(), mimetype="text/event-stream")

    return app
