"""
The fixture `aioserve_tls`: the certificate authority for tests.
"""

from __future__ import annotations

import pytest

from tests.helpers.projects import (
    run_with_anyio,
)


def test_certificate_authority_of_the_fixture_is_trusted(pytester: pytest.Pytester) -> None:
    """By the clients of the fixture, and by every client that gets its context or file."""
    test = """
        import ssl
        import httpx
        import httpx2
        import pytest
        from app import App

        async def test_async(aioserve_server, aioserve_client, aioserve_tls):
            server = await aioserve_server(App(), ssl=aioserve_tls.server, host="localhost")
            assert server.url.startswith("https://")
            client = await aioserve_client(server)
            assert (await client.get("/")).status_code == 200
            client = await aioserve_client(server, verify=ssl.create_default_context())
            with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.get("/")

        def test_sync(aioserve_live_server, aioserve_tls):
            live = aioserve_live_server(App(), ssl=aioserve_tls.server)
            with httpx.Client(verify=aioserve_tls.client) as client:
                assert client.get(live.url).status_code == 200
            with aioserve_tls.ca.cert_pem.tempfile() as path:
                with httpx.Client(verify=ssl.create_default_context(cafile=path)) as client:
                    assert client.get(live.url).status_code == 200
    """
    run_with_anyio(pytester, test).assert_outcomes(passed=2)
