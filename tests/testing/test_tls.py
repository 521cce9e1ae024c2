"""
`aioserve.testing.tls()`: the certificate authority for tests.
"""

from __future__ import annotations

import ssl
import sys

import pytest

from aioserve import testing
from aioserve.testing import clients
from tests.helpers.apps import App


class TestTheAuthority:
    def test_certificate_authority_for_tests_is_made_once(self) -> None:
        """Making keys takes time."""
        assert testing.tls() is testing.tls()

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
    async def test_certificate_for_tests_is_valid_for_this_machine(self, host: str) -> None:
        """By all of its names."""
        async with (
            testing.server(App(), ssl=testing.tls().server, host=host) as server,
            testing.client(server) as client,
        ):
            assert (await client.get("/")).text == "hello"

    async def test_certificate_authority_for_tests_can_issue_other_certificates(self) -> None:
        """For example a client's."""
        tls = clients._make_tls.__wrapped__()
        tls.ca.configure_trust(tls.server)
        tls.server.verify_mode = ssl.CERT_REQUIRED
        tls.ca.issue_cert("somebody@example.org").configure_cert(tls.client)
        async with testing.server(App(), ssl=tls.server) as server, testing.client(server, verify=tls.client) as client:
            assert (await client.get("/")).text == "hello"

    def test_tls_without_trustme_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The extra installs it."""
        monkeypatch.setitem(sys.modules, "trustme", None)
        with pytest.raises(
            ModuleNotFoundError,
            match=r"trustme is not installed; install it with pip install 'aioserve-asgi\[testing\]'",
        ):
            clients._make_tls.__wrapped__()
