"""
HTTP/2, which uvicorn speaks with zttp: the state of its connections.

Each stream of a connection has a cycle in `cycles` until its response is complete. On a plain connection, the first
bytes decide between HTTP/1 and HTTP/2; until then, it is *undecided*.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal
from weakref import ref

from aioserve import _limits


def is_http2(connection: Any) -> bool:
    return hasattr(connection, "cycles")


def is_undecided(connection: Any) -> bool:
    """Whether too little has been read to tell HTTP/1 and HTTP/2 apart; with TLS, the handshake has told it."""
    return hasattr(connection, "alpn_protocols") and hasattr(connection, "buffer")


def stream_state(connection: Any) -> Literal["busy", "new", "idle"]:
    """Return the state of an HTTP/2 connection, which is busy also while its client's flow control holds data back."""
    if connection.cycles or connection.conn.has_pending_send():
        return "busy"
    return "idle" if last_stream(connection) else "new"


def last_stream(connection: Any) -> int:
    """Return the number of the last stream that has been read, or 0: zttp 0.0.35 tells it only in a GOAWAY."""
    connection.transport.write(connection.conn.data_to_send())
    connection.conn.close()
    goaway: bytes = connection.conn.data_to_send()  # not sent
    return int.from_bytes(goaway[9:13], "big") & (2**31 - 1)


def awaited_head(connection: Any) -> object:
    """
    Return which head of a request is awaited; `None` for no head, and for a client that is silent between two requests.

    Where something has come since the last stream, it may be the part of a head: uvicorn has set another timer then.
    """
    if stream_state(connection) == "busy":
        return None
    stream, timer = last_stream(connection), connection.timeout_keep_alive_task
    if stream == 0:
        return "first"
    seen_stream, seen_timer = vars(connection).get("seen_idle", (None, None))
    if seen_stream != stream:
        connection.seen_idle = stream, timer
    return None if seen_stream != stream or seen_timer is timer else stream


def count_streams(connection: Any) -> None:
    """Let a connection be closed in order after some number of streams: zttp 0.0.35 breaks it off at the 4,097th."""
    # Not by another class: CPython 3.13 reads the attributes of an object that has changed its class more slowly.
    connection.handle_request = partial(_handle_request, ref(connection))


def _handle_request(connection_ref: ref[Any], event: Any) -> None:
    connection: Any = connection_ref()
    if event.stream_id > 2 * _limits.HTTP2_REQUESTS:  # a client's have odd numbers
        connection.connections.observer.retire(connection)
    type(connection).handle_request(connection, event)
