"""
A module that raises when it is imported.
"""

from tests.helpers.apps import AppError

raise AppError("at import")
