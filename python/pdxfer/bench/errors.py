"""The errors that the bench reports as a line instead of a traceback."""

from __future__ import annotations

__all__ = ["BenchError", "EndGone"]


class BenchError(Exception):
    """Something the user can act on: the text says what was tried, on what, and the next step."""


class EndGone(BenchError):
    """The other end of the control channel closed it or died."""


def describe(error: BaseException) -> str:
    """One line for a row or the other end: the bench's own errors as they are, others with their type."""
    text = " ".join(str(error).split()) or "no text"
    return text if isinstance(error, BenchError) else f"{type(error).__name__}: {text}"
