"""
The report of a test that fails shows what left the app, where no client has raised it.
"""

from __future__ import annotations

import pytest

from tests.helpers.projects import ANYIO, ASYNCIO, IN_ORDER, WITHOUT_ASYNCIO, backend, run, run_with_anyio

SECTION = "*-- aioserve: what left the app --*"
LATE = "*-- aioserve: what left the app, until its teardown --*"

# An app that raises an exception whose message is the query; before, in or after its response.
RAISING = """
import asyncio
import time
import urllib.error
import urllib.request


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
    elif scope["path"] != "/before":
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": scope["path"] == "/within"})
        if scope["path"] == "/later":
            await asyncio.sleep(0.1)
    raise LookupError(scope["query_string"].decode())


def get(url):
    try:
        urllib.request.urlopen(url)
    except urllib.error.HTTPError as exc:
        exc.close()  # an open one is a ResourceWarning from Python 3.15 on
    except OSError:
        pass


def get_soon(url):
    return asyncio.get_running_loop().run_in_executor(None, get, url)
"""


@pytest.mark.parametrize("path", ["before", "within", "after", "later"])
@pytest.mark.parametrize("options", [(), ("-n1",)], ids=["in one process", "with xdist"])
def test_failure_shows_what_left_the_app_of_a_live_server(
    pytester: pytest.Pytester, path: str, options: tuple[str, ...]
) -> None:
    """Also what leaves it after the response, and when the test has failed already; a test that passes shows none."""
    test = f"""
        from raising import app, get

        def test_1(aioserve_live_server):
            get(aioserve_live_server(app).url + "/{path}?passed")

        def test_2(module_aioserve_live_server):
            get(module_aioserve_live_server(app).url + "/{path}?failed")
            assert False
    """
    done = run(pytester, *IN_ORDER, *options, raising=RAISING, test_it=test)
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines([SECTION, f"GET '/{path}'", "Traceback (most recent call last):", "LookupError: failed"])
    shown = done.stdout.str().partition("what left the app")[2].partition("\n---")[0]
    assert "LookupError: passed" not in shown


@pytest.mark.parametrize("plugin", ["anyio", "pytest-asyncio"])
@pytest.mark.parametrize("scope", ["", "session_"])
def test_failure_shows_what_left_the_app_for_another_client(pytester: pytest.Pytester, plugin: str, scope: str) -> None:
    """In the test's own loop, by what the test has asked, in its order."""
    mark = ASYNCIO if plugin == "pytest-asyncio" else ANYIO
    loop_scope = '(loop_scope="session")' if plugin == "pytest-asyncio" and scope else ""
    test = f"""
        import asyncio
        import pytest
        from raising import app, get_soon

        pytestmark = {mark}{loop_scope}

        @pytest.mark.parametrize("name", ["first", "second"])
        async def test_it({scope}aioserve_server, name):
            server = await {scope}aioserve_server(app)
            for path in ("before", "within"):
                await get_soon(f"{{server.url}}/{{path}}?{{name}}")
            assert False
    """
    options = (*WITHOUT_ASYNCIO,) if plugin == "anyio" else ()
    scope_of_backend = "session" if scope else "function"
    done = run(pytester, *IN_ORDER, *options, conftest=backend(scope_of_backend), raising=RAISING, test_it=test)
    done.assert_outcomes(failed=2)
    for name in ("first", "second"):
        done.stdout.fnmatch_lines(
            [SECTION, "GET '/before'", f"LookupError: {name}", "GET '/within'", f"LookupError: {name}"],
            consecutive=False,
        )
    assert done.stdout.str().count("GET '/before'") == 2


def test_failure_shows_what_leaves_the_app_until_the_end_of_the_fixtures(pytester: pytest.Pytester) -> None:
    """Nothing in the test's loop runs between its failure and their end."""
    test = """
        import asyncio
        from raising import app, get_soon

        async def test_it(aioserve_server):
            asking = get_soon((await aioserve_server(app)).url + "/later?late")
            await asking
            assert False
    """
    done = run_with_anyio(pytester, test, raising=RAISING)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines([LATE, "GET '/later'", "LookupError: late"])


def test_failure_of_a_fixture_shows_what_left_the_app(pytester: pytest.Pytester) -> None:
    """At its setup, and at its teardown."""
    test = """
        import pytest
        from raising import app, get

        @pytest.fixture
        def fails_early(aioserve_live_server):
            get(aioserve_live_server(app).url + "/before?early")
            assert False

        @pytest.fixture
        def fails_late(aioserve_live_server):
            yield
            get(aioserve_live_server(app).url + "/before?late")
            assert False

        def test_1(fails_early):
            pass

        def test_2(fails_late):
            pass
    """
    done = run(pytester, *IN_ORDER, raising=RAISING, test_it=test)
    done.assert_outcomes(passed=1, errors=2)
    done.stdout.fnmatch_lines([SECTION, "LookupError: early", SECTION, "LookupError: late"])


def test_failure_shows_what_left_the_handler_of_a_websocket(pytester: pytest.Pytester) -> None:
    """No client of ours raises it; a disconnect is no failure."""
    test = """
        from raising import app
        from websockets.exceptions import ConnectionClosed
        from websockets.sync.client import connect

        def test_it(aioserve_live_server):
            with connect(aioserve_live_server(app).url.replace("http", "ws") + "/chat?socket") as websocket:
                try:
                    websocket.recv()
                except ConnectionClosed:
                    pass
            assert False
    """
    done = run(pytester, *IN_ORDER, raising=RAISING, test_it=test)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines([SECTION, "WebSocket '/chat'", "LookupError: socket"])


def test_failure_by_what_left_the_app_shows_it_once(pytester: pytest.Pytester) -> None:
    """Without frames of aioserve; and a path of a client's is quoted."""
    test = r"""
        from raising import app, get_soon

        async def test_raised(aioserve_client):
            client = await aioserve_client(app)
            await client.get("/before?raised")

        async def test_quoted(aioserve_server):
            server = await aioserve_server(app)
            await get_soon(server.url + "/a%0AE%20%20forged?quoted")
            assert False
    """
    done = run_with_anyio(pytester, test, "--show-capture=no", raising=RAISING)
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines("E*LookupError: raised")
    assert done.stdout.str().count("LookupError: raised") == 2  # with the line of the summary
    done.stdout.no_fnmatch_line("*app_errors.py*")
    done = run_with_anyio(pytester, test, raising=RAISING)
    done.stdout.fnmatch_lines([SECTION, r"GET '/a\nE  forged'", "LookupError: quoted"])
    shown = done.stdout.str().partition("what left the app")[2]
    assert "LookupError: quoted" in shown
    assert "LookupError: raised" not in shown.partition("short test summary")[0]
    assert "app_errors.py" not in shown
