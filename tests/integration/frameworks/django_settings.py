"""
All settings that Django needs.
"""

from __future__ import annotations

SECRET_KEY = "for tests"  # noqa: S105
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "tests.integration.frameworks.with_django"
LOGGING_CONFIG = None  # the tests' own
