"""The one error that the bench reports as a line instead of a traceback."""

from __future__ import annotations

__all__ = ["BenchError"]


class BenchError(Exception):
    """Something the user can act on: the text says what was tried, on what, and the next step."""
