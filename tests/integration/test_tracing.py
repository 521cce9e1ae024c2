"""
OpenTelemetry and Sentry: what they record of requests, and of a stop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from anyio.to_thread import run_sync
from fastapi import FastAPI
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from aioserve import App, Server, serving
from tests.helpers.programs import Program
from tests.integration.frameworks import Play

pytestmark = [
    pytest.mark.timeout(60),
    # OpenTelemetry adds this filter with each tracer: here it is there before the tests.
    pytest.mark.filterwarnings(
        "ignore:You should use InstrumentationScope. Deprecated since version 1.11.1."
        ":DeprecationWarning:opentelemetry.sdk.trace"
    ),
]

# Each of them records the requests of an app, by its provider.
PACKAGES = ["asgi", "fastapi"]
ALL = [*PACKAGES, "FastAPI's own"]


class Telemetry:
    """An app with OpenTelemetry, and the spans that it has ended."""

    def __init__(self, play: Play, by: str, *, span_of_lifespan: bool = False) -> None:
        self.play = play
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("program")
        self.span_of_lifespan = span_of_lifespan
        routes: list[BaseRoute] = [Route("/", self.root), Route("/hold", self.hold), Route("/events", self.events)]
        if by == "asgi":
            starlette = Starlette(routes=routes, lifespan=self.lifespan)
            self.app: App = OpenTelemetryMiddleware(starlette, tracer_provider=self.provider)
        elif by == "fastapi":
            fastapi = FastAPI(routes=routes, lifespan=self.lifespan)
            FastAPIInstrumentor.instrument_app(fastapi, tracer_provider=self.provider)
            self.app = fastapi
        else:
            self.app = FastAPI(routes=routes, lifespan=self.lifespan, telemetry={"tracer_provider": self.provider})

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        if not self.span_of_lifespan:
            yield
            return
        with self.tracer.start_as_current_span("lifespan"):
            yield

    async def root(self, request: Request) -> Response:
        return PlainTextResponse("hello")

    async def hold(self, request: Request) -> Response:
        await self.play.hold()
        return PlainTextResponse("held")

    async def events(self, request: Request) -> Response:
        async def stream() -> AsyncIterator[str]:
            yield "data: hello\n\n"
            await self.play.hold()

        return StreamingResponse(stream(), media_type="text/event-stream")

    def request(self) -> ReadableSpan:
        """Return the span of the only request."""
        names = ("GET /", "GET /hold", "GET /events")
        (span,) = (span for span in self.exporter.get_finished_spans() if span.name in names)
        return span

    def parent(self) -> str | None:
        """Return the name of the parent of the request's span."""
        names = {span.context.span_id: span.name for span in self.exporter.get_finished_spans() if span.context}
        parent = self.request().parent
        return None if parent is None else names[parent.span_id]


async def get(server: Server, path: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(f"{server.url}{path}", headers={"accept": "text/event-stream"})


@pytest.mark.parametrize(
    ("by", "reset", "span_of_lifespan", "parent"),
    [
        *((by, False, False, "program") for by in PACKAGES),
        *((by, False, True, "lifespan") for by in PACKAGES),
        *((by, True, True, None) for by in PACKAGES),
        ("FastAPI's own", False, True, None),
    ],
)
async def test_span_that_is_open_at_the_start_is_the_parent_of_requests_unless_their_context_is_reset(
    by: str, reset: bool, span_of_lifespan: bool, parent: str | None, loop_name: str
) -> None:
    """So is one that the lifespan has opened; FastAPI's own telemetry ignores both."""
    telemetry = Telemetry(Play(), by, span_of_lifespan=span_of_lifespan)
    with telemetry.tracer.start_as_current_span("program"):
        async with serving(telemetry.app, reset_contextvars=reset) as server:
            await get(server, "/")
    assert telemetry.parent() == parent


@pytest.mark.parametrize("by", ALL)
async def test_span_that_is_opened_after_the_start_is_not_the_parent_of_requests(by: str, loop_name: str) -> None:
    telemetry = Telemetry(Play(), by)
    async with serving(telemetry.app) as server:
        with telemetry.tracer.start_as_current_span("program"):
            await get(server, "/")
    assert telemetry.parent() is None


@pytest.mark.parametrize(
    ("by", "is_open", "reset", "is_parent"),
    [
        *((by, False, False, True) for by in ALL),
        *((by, True, False, by not in PACKAGES) for by in ALL),
        *((by, True, True, True) for by in ALL),
    ],
)
async def test_parent_that_a_client_sends_is_the_parent_of_its_request_unless_another_was_open_at_the_start(
    by: str, is_open: bool, reset: bool, is_parent: bool, loop_name: str
) -> None:
    """FastAPI's own telemetry prefers it, other middleware the open span."""
    telemetry = Telemetry(Play(), by)
    with telemetry.tracer.start_as_current_span("program") if is_open else contextlib.nullcontext():
        async with serving(telemetry.app, reset_contextvars=reset) as server:
            async with httpx.AsyncClient(trust_env=False) as client:
                await client.get(server.url, headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
    parent = telemetry.request().parent
    assert parent is not None
    assert ((parent.trace_id, parent.span_id) == (int("a" * 32, 16), int("b" * 16, 16))) == is_parent


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


async def answered(telemetry: Telemetry) -> None:
    async with serving(telemetry.app, shutdown_timeout=None) as server:
        asking = asyncio.create_task(get(server, "/hold"))
        await telemetry.play.holding.wait()
        server.close()
        telemetry.play.release()
        assert (await asking).text == "held"


async def forced(telemetry: Telemetry) -> None:
    async with serving(telemetry.app, shutdown_timeout=0.05) as server:
        asking = asyncio.create_task(get(server, "/hold"))
        await telemetry.play.holding.wait()
        server.close()
        assert (await asking).status_code == 500


async def gone(telemetry: Telemetry) -> None:
    async with serving(telemetry.app, cancel_on_disconnect=True) as server:
        asking = asyncio.create_task(get(server, "/hold"))
        await telemetry.play.holding.wait()
        asking.cancel()
        while server.stats.in_flight:
            await asyncio.sleep(0)


async def disconnected(telemetry: Telemetry) -> None:
    async with serving(telemetry.app, shutdown_timeout=None) as server:
        asking = asyncio.create_task(get(server, "/events"))
        await telemetry.play.holding.wait()
        server.close()
        assert (await asking).status_code == 200


@pytest.mark.usefixtures("short_grace")
@pytest.mark.parametrize("by", ALL)
@pytest.mark.parametrize(
    ("happening", "status", "error"),
    [
        (answered, 200, None),
        (forced, None, "asyncio.exceptions.CancelledError"),
        (gone, None, "asyncio.exceptions.CancelledError"),
        (disconnected, 200, "ConnectionError"),
    ],
)
async def test_span_of_a_request_in_a_stop_is_ended(
    by: str, happening: Callable[[Telemetry], object], status: int | None, error: str | None, loop_name: str
) -> None:
    """With an error only by FastAPI's own telemetry."""
    telemetry = Telemetry(Play(), by)
    done = happening(telemetry)
    assert asyncio.iscoroutine(done)
    await done
    span = telemetry.request()
    found = attributes(span)
    assert found.get("http.status_code", found.get("http.response.status_code")) == status
    failed = error is not None and by == "FastAPI's own"
    assert found.get("error.type") == (error if failed else None)
    assert span.status.status_code is (StatusCode.ERROR if failed else StatusCode.UNSET)


async def test_exporter_that_is_shut_down_after_the_block_has_the_spans_of_the_stop(loop_name: str) -> None:
    """And its thread ends."""
    telemetry = Telemetry(Play(), "asgi")
    late = InMemorySpanExporter()
    telemetry.provider.add_span_processor(BatchSpanProcessor(late))
    await answered(telemetry)
    await run_sync(telemetry.provider.shutdown)
    assert "GET /hold" in [span.name for span in late.get_finished_spans()]


# Sentry


def sentry(*arguments: str) -> tuple[list[str], int]:
    """Run a program with Sentry; return what it has recorded, and the exit code."""
    module = "tests.integration.frameworks.with_sentry"
    with Program("-m", module, *arguments, warnings_are_errors=False) as child:
        code, _ = child.end()
    return child.said, code


NOT_TRACED = "own trace: True runs: 0"


def test_sentry_has_one_event_of_a_handler_that_raises_and_a_trace_for_each_request() -> None:
    assert sentry("requests")[0] == [
        f"transaction / ok {NOT_TRACED}",
        "event None /broken LookupError who: None",
        f"transaction /broken internal_error {NOT_TRACED}",
    ]


@pytest.mark.parametrize(("mode", "tag"), [("inside", "program"), ("inside_with_reset", "None")])
def test_requests_inside_of_a_transaction_have_their_own_and_the_tags_unless_reset(mode: str, tag: str) -> None:
    assert sentry(mode)[0] == [
        f"transaction / ok {NOT_TRACED}",
        f"event None /broken LookupError who: {tag}",
        f"transaction /broken internal_error {NOT_TRACED}",
        "transaction program None own trace: False runs: 0",
    ]


def test_sentrys_integration_of_asyncio_adds_the_requests_to_an_open_transaction() -> None:
    assert sentry("inside", "asyncio")[0][-1] == "transaction program None own trace: False runs: 2"


@pytest.mark.parametrize("mode", ["forced", "gone"])
def test_handler_that_is_cancelled_is_no_event(mode: str) -> None:
    assert sentry(mode) == ([f"transaction /hold internal_error {NOT_TRACED}"], 0)


def test_lifespan_that_fails_is_one_event_and_another_if_the_error_leaves_the_program() -> None:
    own = "event None None LookupError who: None"
    assert sentry("startup") == ([own, "event None None LookupError StartupError who: None"], 1)
    assert sentry("shutdown") == ([own, "caught"], 0)
    assert sentry("crash") == (
        [
            "event None None LookupError ExceptionGroup who: None",
            "event None None ExceptionGroup ServerCrashedError who: None",
        ],
        1,
    )
    assert sentry("crash", "asyncio")[0][0] == own


def test_shutdown_that_fails_behind_a_body_that_has_failed_is_two_events() -> None:
    """The app's exception, and what aioserve logs."""
    own = "event None None LookupError who: None"
    assert sentry("both") == ([own, "event aioserve None LookupError ShutdownError who: None", "caught"], 0)
