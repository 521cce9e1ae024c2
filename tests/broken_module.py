"""
A module that raises when it is imported.
"""

from tests.apps import AppError

raise AppError("at import")
