"""
Fixtures for pytest: real servers and their clients, in the test's own event loop.

pytest loads this file in every run, wherever aioserve is installed. So it imports only pytest; a fixture imports what
it needs when it is used.

An async fixture belongs to the plugin that runs the loop. So each public fixture uses one of several private fixtures,
all made from one function: one for anyio's plugin, and one for each loop that pytest-asyncio can have.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator

    from aioserve.testing import TLS, ClientFactory, LiveServerFactory, ServerFactory
    from aioserve.testing.fixtures import Opened

# pytest's scopes, narrowest first.
SCOPES = ("function", "class", "module", "package", "session")


def pytest_configure(config: pytest.Config) -> None:
    """Register the private fixtures for pytest-asyncio, if it is used."""
    if _uses_pytest_asyncio(config):
        config.pluginmanager.register(_for_pytest_asyncio(), "aioserve for pytest-asyncio")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what left the apps of the servers in a test that fails."""
    report = yield
    app_errors = sys.modules.get("aioserve.testing.app_errors")
    if app_errors is not None:
        app_errors.add_section(report)
    return report


def _make_server(request: pytest.FixtureRequest) -> ServerFactory:
    """
    Start servers in the test's own loop: ``server = await aioserve_server(app, **options)``.

    They are closed in reverse order at the end of the fixture's scope. A server that had to use force then, or whose
    lifespan crashed, fails the test. The arguments are those of `aioserve.testing.server()`.
    """
    return _opened(request).server


def _make_client(request: pytest.FixtureRequest) -> ClientFactory:
    """
    Open HTTP clients: ``client = await aioserve_client(app_or_server, **options)``.

    An app is served as by the fixture for servers. The arguments are those of `aioserve.testing.client()`; so an
    exception that leaves the app is raised by the request that caused it.
    """
    return _opened(request).client


def _make_live_server() -> Iterator[LiveServerFactory]:
    """
    Start servers in a thread, for synchronous tests: ``live = aioserve_live_server(app, **options)``.

    They are closed in reverse order at the end of the fixture's scope. The arguments are those of
    `aioserve.testing.live_server()`.
    """
    __tracebackhide__ = True
    from aioserve.testing.fixtures import LiveServers

    with LiveServers() as servers:
        yield servers.start


@pytest.fixture(scope="session")
def aioserve_tls() -> TLS:
    """Return a certificate authority for tests; its `server` and `client` are SSL contexts."""
    from aioserve.testing import tls

    return tls()


aioserve_server: object = pytest.fixture(_make_server)
module_aioserve_server: object = pytest.fixture(_make_server, scope="module")
session_aioserve_server: object = pytest.fixture(_make_server, scope="session")

aioserve_client: object = pytest.fixture(_make_client)
module_aioserve_client: object = pytest.fixture(_make_client, scope="module")
session_aioserve_client: object = pytest.fixture(_make_client, scope="session")

aioserve_live_server: object = pytest.fixture(_make_live_server)
module_aioserve_live_server: object = pytest.fixture(_make_live_server, scope="module")
session_aioserve_live_server: object = pytest.fixture(_make_live_server, scope="session")


def _opening() -> Callable[[], AsyncIterator[Opened]]:
    """Make the function of a private fixture; each needs its own, since pytest-asyncio marks it."""

    async def opening() -> AsyncIterator[Opened]:
        __tracebackhide__ = True
        from aioserve.testing.fixtures import Opened

        async with Opened() as opened:
            yield opened

    return opening


_aioserve_function_anyio = pytest.fixture(_opening())
_aioserve_module_anyio = pytest.fixture(_opening(), scope="module")
_aioserve_session_anyio = pytest.fixture(_opening(), scope="session")


def _for_pytest_asyncio() -> ModuleType:
    """Make a plugin with a private fixture for each scope and each loop in which it can run."""
    import pytest_asyncio

    plugin = ModuleType("aioserve for pytest-asyncio")
    make: Any = pytest_asyncio.fixture
    for scope in ("function", "module", "session"):
        for loop_scope in SCOPES[SCOPES.index(scope) :]:
            name = f"_aioserve_{scope}_asyncio_{loop_scope}"
            setattr(plugin, name, make(_opening(), scope=scope, loop_scope=loop_scope, name=name))
    return plugin


def _opened(request: pytest.FixtureRequest) -> Opened:
    """Return the private fixture of the plugin that runs the test's loop."""
    asyncio_plugin = _uses_pytest_asyncio(request.config)
    is_test = isinstance(request.node, pytest.Item)  # a fixture of a wider scope does not know its tests
    if asyncio_plugin and is_test and sys.modules["pytest_asyncio"].is_async_test(request.node):
        runner = f"asyncio_{_loop_scope(request)}"
    elif "anyio_backend" in request.fixturenames:
        runner = "anyio"
        backend = request.getfixturevalue("anyio_backend")
        name = backend if isinstance(backend, str) else backend[0]
        if name != "asyncio":
            pytest.fail(
                f"aioserve runs only on asyncio, and this test runs on {name}; define a fixture anyio_backend that "
                'returns "asyncio"',
                pytrace=False,
            )
    elif asyncio_plugin and request.scope != "function":
        runner = f"asyncio_{_loop_scope(request)}"
    else:
        live = str(request.fixturename).replace("_client", "_server").replace("_server", "_live_server")
        pytest.fail(
            f"{request.fixturename} is for async tests: mark this test with pytest.mark.anyio, or with "
            f"pytest.mark.asyncio if pytest-asyncio is installed; in a synchronous test, use {live}",
            pytrace=False,
        )
    opened: Opened = request.getfixturevalue(f"_aioserve_{request.scope}_{runner}")
    return opened


def _uses_pytest_asyncio(config: pytest.Config) -> bool:
    plugin = sys.modules.get("pytest_asyncio.plugin")
    return plugin is not None and config.pluginmanager.is_registered(plugin)


def _loop_scope(request: pytest.FixtureRequest) -> str:
    """Return the scope of the loop that the test or module asks for; at least the fixture's own."""
    marker = request.node.get_closest_marker("asyncio")
    asked: str | None = marker.kwargs.get("loop_scope") if marker is not None else None
    return max(asked or request.config.getini("asyncio_default_test_loop_scope"), request.scope, key=SCOPES.index)
