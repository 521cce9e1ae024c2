"""
`receive()` says that the client has gone: `http.disconnect` while `send()` still works; and for WebSockets.

For HTTP, uvicorn has one flag for both. `receive()` waits for an event, clears it, and looks at the flag; so the event
is replaced, and the flag looks different right after the event was cleared.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any, Literal

from uvicorn.protocols.utils import ClientDisconnected

from aioserve import _limits
from aioserve._log import uvicorn_logger
from aioserve._uvicorn.logs import silence_expected_errors


def disconnect(cycle: Any, loop: Any, may_have_unread: Callable[[Any], bool], *, end_response: bool = False) -> None:
    """
    Let `receive()` say `http.disconnect` from now on, after what has arrived of the request.

    For that, `may_have_unread` tells whether something on a cycle's connection may not be read yet. With
    `end_response`, a handler that then returns and leaves its response unfinished has ended it, as its client sees it.
    """
    if isinstance(cycle.message_event, _DisconnectEvent):
        return
    silence_expected_errors(cycle, functools.partial(_end_response, cycle) if end_response else None)
    cycle.message_event = _DisconnectEvent(cycle, loop, may_have_unread)
    cycle.__class__ = _disconnected_class(type(cycle))  # type: ignore[arg-type]
    cycle.message_event.wake_up()


def _end_response(cycle: Any) -> None:
    """Send the last chunk. It is little, so it is not kept back where the client reads slowly."""
    cycle.abort_stream = lambda: None  # HTTP/2's, which would follow
    paused, cycle.flow.write_paused = cycle.flow.write_paused, False
    try:
        cycle.send({"type": "http.response.body", "body": b"", "more_body": False}).send(None)
    except StopIteration:
        pass
    except Exception as exc:  # noqa: BLE001 (it has said how long it is, and is shorter: h11 raises its own)
        uvicorn_logger.debug("a stream could not be ended: %s", exc)
    finally:
        cycle.flow.write_paused = paused


class _DisconnectEvent:
    """Replaces a cycle's `asyncio.Event`: when no message is left, `receive()` returns the disconnect."""

    def __init__(self, cycle: Any, loop: asyncio.AbstractEventLoop, may_have_unread: Callable[[Any], bool]) -> None:
        self._cycle = cycle
        self._loop = loop
        self._may_have_unread = may_have_unread
        self._event = cycle.message_event  # a handler may be waiting for it
        self._has_message = cycle.message_event.is_set()
        self._turns = _limits.BODY_TURNS

    def wake_up(self) -> None:
        """Wake the handler up, unless what has arrived is about to."""
        if self._body_is_coming():
            self._loop.call_soon(self.wake_up)
        else:
            self._event.set()

    async def wait(self) -> bool:
        while self._body_is_coming():  # noqa: ASYNC110 (the loop reads it, and has no event for that)
            await asyncio.sleep(0)
        return True

    def _body_is_coming(self) -> bool:
        """Whether more of the request's body has arrived and is about to be read; with a limit to the looks."""
        self._turns -= 1
        if self._turns <= 0 or self._has_message or not self._cycle.more_body:
            return False
        return self._may_have_unread(self._cycle)

    def set(self) -> None:
        self._has_message = True
        self._event.set()

    def is_set(self) -> bool:
        return True

    def clear(self) -> None:
        if self._has_message:
            self._has_message = False
        else:
            self._cycle.says_disconnected = True


@functools.cache
def _disconnected_class(cycle_class: type[Any]) -> type[Any]:
    class DisconnectedCycle(cycle_class):  # type: ignore[misc]
        says_disconnected = False

        @property
        def disconnected(self) -> bool:
            says_disconnected, self.says_disconnected = self.says_disconnected, False
            return says_disconnected or bool(self.__dict__["disconnected"])

        @disconnected.setter
        def disconnected(self, value: bool) -> None:
            self.__dict__["disconnected"] = value

    return DisconnectedCycle


_STOPPED = b"The server is being stopped. Please try again.\n"
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: %d\r\nconnection: close\r\nretry-after: 0\r\n\r\n%s" % (len(_STOPPED), _STOPPED)
)


def refuse(websocket: Any) -> None:
    """
    Answer a WebSocket with 503 that the app has neither accepted nor refused, and close its connection.

    From now on `receive()` says `websocket.disconnect`, and `send()` raises uvicorn's `ClientDisconnected`.
    """
    websocket.transport.write(_REFUSAL)
    if hasattr(websocket, "queue"):  # wsproto, websockets-sansio
        disconnect_websocket(websocket)
        websocket.writable = _Gone()
        websocket.handshake_complete = True  # or a handler that returns is logged as one that has forgotten it
    else:
        silence_expected_errors(websocket)
        websocket.__class__ = _refused_class(type(websocket))  # type: ignore[arg-type]
        websocket.ws_server.closing = True  # hence 1012
        websocket.handler_task.cancel()  # it would answer as well
        websocket.handshake_started_event.set()
        websocket.handshake_completed_event.set()
    websocket.transport.close()


def disconnect_websocket(websocket: Any) -> None:
    """Let `receive()` say `websocket.disconnect`; not for the legacy protocol."""
    silence_expected_errors(websocket)
    websocket.queue.put_nowait({"type": "websocket.disconnect", "code": 1012, "reason": ""})


class _Gone(asyncio.Event):
    """Replaces the event for which `send()` waits before anything else."""

    async def wait(self) -> Literal[True]:
        raise ClientDisconnected


@functools.cache
def _refused_class(legacy_class: type[Any]) -> type[Any]:
    from websockets.exceptions import ConnectionClosedError  # it is there, since the legacy protocol is

    class RefusedWebSocket(legacy_class):  # type: ignore[misc]
        @property
        def initial_response(self) -> None:  # `send()` looks at it, unless the app has closed the WebSocket
            raise ClientDisconnected

        async def recv(self) -> None:
            raise ConnectionClosedError(None, None)

    return RefusedWebSocket
