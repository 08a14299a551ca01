"""The errors that the bench reports as a line instead of a traceback."""

from __future__ import annotations

__all__ = ["BenchError", "EndGone"]


class BenchError(Exception):
    """Something the user can act on: the text says what was tried, on what, and the next step."""


class EndGone(BenchError):
    """The other end of the control channel closed it or died."""
