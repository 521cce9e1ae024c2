"""
Every grace, number of turns and bound of this package.

Read them as `_limits.NAME` where they are used, so that a test can change them.
"""

from __future__ import annotations

# Seconds.
FIRST_REQUEST = 0.25  # for a connection that has sent nothing yet to send its first request
PARTIAL_REQUEST = 1.0  # for the next byte of a request of which a part has come; and after a TLS handshake
HTTP2_STREAMS = 1.0  # without a moment in which no stream is open, until a client is told to open no more
LAST_HANDSHAKES = 0.0002  # for the kernel to complete the handshakes of TCP that have begun when a port is closed
HTTP2_QUIET = 1.0  # for a client without a stream to send other frames than those that begin one
HTTP2_ACKNOWLEDGEMENT = 0.25  # for a client to tell that it has read its last answer, before its connection closes
HTTP2_RECENT = 0.1  # the same for one that was idle at the stop, if it had its last answer no longer ago than that
LOOPS_HANDSHAKE = 60.0  # asyncio's and uvloop's own limit for a TLS handshake
TLS_HANDSHAKE = 1.0  # for a TLS handshake that is under way when a stop begins
SLOW_STOP = 1.25  # until a stop says what it waits for; longer than one second for clients that have gone silent
CANCELLED_HANDLERS = 1.0  # for cancelled handlers to end; one that swallows its cancellation is left behind
LIFESPAN_GRACE = 1.0  # for a lifespan to end that was cancelled, or is forced to shut down
LINGER = 1.0  # for the next byte of a client that is still sending to a connection that is closed
HTTP2_LINGER = 0.1  # the same for a client of HTTP/2 that has read all its answers
LINGER_LONGEST = 5.0  # for all that such a client sends
SHORTEST_LOOK = 0.01  # until the next look at TLS handshakes, or at clients that have not sent a head
ACTIVE = 0.1  # since a WebSocket's last message, for it to count as one whose client is sending
TRIED_ACCEPT = 5.0  # for a loop to accept a connection from itself, when it is tried what it can do
LOOK_FOR_CTRL_C = 0.1  # until Python handles a Ctrl+C that comes while it waits for a thread, on Windows
LOOK_AT_FLUSH = 0.02  # until the next look at a closing TLS connection, on loops that cannot watch a socket
LOOK_AT_THREADS = 0.02  # until the next look at threads that are ending, in a check for leaks
ACCEPT_RETRY = 1.0  # until the next accept() when one failed, for example because no descriptor is left
CHILD_EXIT = 1.0  # for a child process to exit when its server has stopped, and to react when it is forced
ORPHAN_SHUTDOWN = 10.0  # the shutdown timeout of a child whose parent has died, if its own is unlimited
THREAD_EXIT = 1.0  # for the thread of `start_in_thread()` to end when its server has closed
RAISING_HANDLER = 1.0  # for a handler to end that has sent a 500, or broken off: a client in a test raises its error
LATE_EXCEPTIONS = 0.25  # for handlers in other threads to end, before a test's failure shows what left the app
ENDING_THREADS = 5.0  # for threads to end, in a check for leaks; a loop tells its workers to end when it closes
_FOREVER = 1e9  # some thirty years; more counts as no limit

# Turns of the event loop.
# For a connection that was accepted, closed or aborted to become known, or to go, and for its data to be read: task,
# connection_made(), select, read. Most handlers have accepted their WebSocket by then.
SETTLING_TURNS = 4
LAST_MESSAGE_TURNS = 10  # for a handler that was told of a disconnect to send a last message
BODY_TURNS = 100  # for a handler to read what has arrived of a body before that: enough for all that a kernel keeps
TURNS_BEFORE_TIMER = 3  # before it is worth the cost to make a timer for a wait
LEAK_TURNS = 10  # for a loop to close what was just released, in a check for leaks: transports need two or three

HTTP2_PINGS = 10  # at least, to a client that opens a stream behind each of them, until its connection closes so

FRAMES = 1_000  # of one task that are looked at, to say where a handler waits
INNER_TASKS = 20  # that are looked into for that
HTTP2_REQUESTS = 1_000  # on one connection, which then closes; and again, until its client is told to open no stream
WRAPPING_COROUTINES = 50  # of a task factory that are looked into to find the handler that they wrap
CLOSED_AT_ONCE = 100  # connections without a request, before it is the turn of others
LINGER_READS = 16  # of 64 KiB, before it is the turn of others
SAME_PORT_ATTEMPTS = 32  # to find a port that is free on several addresses, when any will do
SHOWN_EXCEPTIONS = 20  # that left the app during one test, in the report of its failure
TRACEBACK_CHARACTERS = 100_000  # of an app's traceback; longer ones repeat themselves


def check_timeout(name: str, value: object) -> float | None:
    """Return a timeout in seconds; `None` means no limit, and so does infinity."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds or None, not {value!r}")
    if not value >= 0:  # nan is not, either
        raise ValueError(f"{name} must be 0 or more seconds, not {value!r}; None means no limit")
    return None if value >= _FOREVER else value


def longest_stop(drain_delay: float, shutdown_timeout: float) -> float:
    """Return how many seconds a stop can take at most, if the app does not block the loop."""
    lifespan = max(shutdown_timeout, LIFESPAN_GRACE) + LIFESPAN_GRACE
    return drain_delay + shutdown_timeout + CANCELLED_HANDLERS + lifespan
