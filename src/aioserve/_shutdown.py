"""
How a server stops, from the call of `close()` to the last line. The documentation repeats these phases, and a test
compares them.

    asked            `stopping` is set; from here on, HTTP/1 responses have the header `connection: close`
    drain            for `drain_delay`, the server still accepts connections
    stop accepting   connections that wait in the kernel's queue are accepted, then the listeners close; idle
                     connections close
    settle           data that has already arrived is read and parsed
    finish           requests in flight are answered, within `shutdown_timeout`; WebSockets are closed with 1012, and
                     handlers of event streams get `http.disconnect`
    disconnect       after `disconnect_after`, or when the `shutdown_timeout` is over, other handlers that wait in
                     `receive()` get `http.disconnect`
    force            when the `shutdown_timeout` is over, handlers are cancelled and awaited for one second, and
                     connections are dropped
    end              after the last handler, the app's lifespan shuts down

So a request that had reached this machine is answered, and an idle connection is never waited for. Each wait ends with
an event or at its limit; only `shutdown_timeout=None` has no limit. A stop that is forced (`Condition.force()`) waits
only for what it has cancelled. Most stops of an idle server need no timer. If there are handlers, but nothing is idle
or unread, "finish" begins while the last connections are still being accepted.
"""

from __future__ import annotations

import asyncio
import threading

import anyio

from aioserve import _limits
from aioserve._connections import Connections
from aioserve._errors import ShutdownError
from aioserve._finish import finish
from aioserve._lifespan import Lifespan
from aioserve._report import Report
from aioserve._settings import Settings
from aioserve._waiting import Condition, SlowStop

_event_lock = threading.Lock()
_SIGNAL_FORCES = "; a second signal, or close(timeout=0), forces the stop"
_CTRL_C_FORCES = "; a second Ctrl+C, or close(timeout=0), forces the stop"
_HOW_TO_END_SOONER = "; let long handlers watch server.stopping, or set disconnect_after"


class Shutdown:
    """The stop of one server: it can be asked for at any time and any number of times, and is run once."""

    asked_at: float | None = None
    """When the stop was asked for first, in the loop's time."""
    failure: Exception | None = None
    """What `_stop_accepting()` raised in the caller's step; the server's task calls it again."""
    is_set: bool = False
    is_expired: bool = False
    """Whether the deadline of a `close()` is over."""

    _closes_first: bool | None = None  # WebSockets and streams, before the listeners; `None` until that is known
    _has_stopped_accepting: bool = False
    _event: anyio.Event | None = None
    _deadline: float | None = None
    _deadline_timer: asyncio.TimerHandle | None = None

    def __init__(
        self, settings: Settings, connections: Connections, lifespan: Lifespan, condition: Condition, name: str
    ) -> None:
        self._settings = settings
        self._connections = connections
        self._lifespan = lifespan
        self._condition = condition
        self._name = name
        self._loop = asyncio.get_running_loop()

    # Asked.

    def ask(self, deadline: float | None = None, *, begin: bool = False) -> None:
        """
        Ask for the stop; a deadline, in the loop's time, can only shorten it.

        With `begin`, it stops accepting in this very step, which saves a task that waits for the end two loop turns.
        """
        if self.asked_at is None:
            settings = self._settings
            self.asked_at = self._loop.time()
            self.set()
            settings.notify_systemd("STOPPING=1")
            # Where tasks start eagerly, a task can be inside any call of a protocol, and must not close it there.
            if begin and not (settings.drain_delay or settings.config.ssl or self._loop.get_task_factory()):
                try:
                    self._refuse_new()
                    if not self._closes_first:
                        self._stop_accepting()
                except Exception as exc:  # noqa: BLE001 (it is raised at the end)
                    self.failure = exc
            self._connections.announce_close()
        self._condition.notify()
        if deadline is None:
            return
        if deadline <= self._loop.time():
            self._condition.force()
        elif self._deadline is None or deadline < self._deadline:
            self.cancel_deadline()
            self._deadline = deadline
            self._deadline_timer = self._loop.call_at(deadline, self._expire)

    def set(self) -> None:
        self.is_set = True  # first, for a thread that is just making the event
        if self._event is not None:
            self._event.set()

    @property
    def event(self) -> anyio.Event:
        """Set when the stop is asked for; made for those who look at it."""
        with _event_lock:  # any thread may look at it
            if self._event is None:
                self._event = anyio.Event()
                if self.is_set:
                    self._event.set()
            return self._event

    def cancel_deadline(self) -> None:
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()

    def _expire(self) -> None:
        self.is_expired = True
        self._condition.notify()

    # Run by the server's task.

    async def run(self, *, drain: bool) -> tuple[Report, ShutdownError | None]:
        """Stop, and return how it went, and what the app's lifespan raised. A server that has failed does not drain."""
        asked_at = self._loop.time() if self.asked_at is None else self.asked_at
        if drain and self._settings.drain_delay:
            await self._condition.wait_for(
                lambda: self.is_expired or self._lifespan.crashed, self._settings.drain_delay
            )

        if self._closes_first is None:
            self._refuse_new()
        if not self._has_stopped_accepting:
            if self._closes_first and self._connections.is_settled():
                self._connections.close_unneeded()
                await self._condition.turns(1)
            self._stop_accepting()
        advice = _SIGNAL_FORCES if self._settings.stop_on_signals else _CTRL_C_FORCES
        slow_stop = SlowStop(self._condition, self._name, advice)
        report = Report() if self._connections.is_finished() else await self._finish(slow_stop)

        error = None
        try:
            await self._lifespan.shutdown(self._settings.shutdown_timeout, slow_stop)
        except ShutdownError as exc:
            error = exc
        report.duration = self._loop.time() - asked_at
        report.lifespan_stuck = self._lifespan.is_stuck
        return report, error

    def _refuse_new(self) -> None:
        connections = self._connections
        can_wait = connections.acceptor.refuse_new(has_clients=bool(connections.handlers()))
        self._closes_first = can_wait and not connections.has_idle()
        connections.state.look_no_more()

    def _stop_accepting(self) -> None:
        """Stop accepting; then close what is idle, since clients send their next requests while handshakes end."""
        self._connections.acceptor.close()
        if not self._closes_first:  # else only those are idle that were answered since
            self._connections.close_idle()
        if self._connections.needs_no_app():
            self._lifespan.request_shutdown()
        self._has_stopped_accepting = True

    async def _finish(self, slow_stop: SlowStop) -> Report:
        connections, condition = self._connections, self._condition
        # Settle.
        if not connections.is_settled():
            await condition.turns(_limits.SETTLING_TURNS)
        began = self._loop.time()
        connections.close_unneeded()
        if condition.forced:
            await condition.turns(_limits.SETTLING_TURNS)

        return await finish(
            connections,
            condition,
            slow_stop,
            name=self._name,
            advice=_HOW_TO_END_SOONER,
            budget=self._settings.shutdown_timeout,
            disconnect_after=self._settings.disconnect_after,
            since=began,
            is_expired=lambda: self.is_expired,
            deadline=lambda: self._deadline,
        )
