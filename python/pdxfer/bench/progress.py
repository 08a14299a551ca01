"""Progress on stderr: a bar that rewrites itself on a terminal, a line per row elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_EVERY = 0.1  # seconds between two drawings


class Progress:
    """Shows how far a run of `rows` rows is. Not for several threads."""

    def __init__(self, rows: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._rows = rows
        self._done = 0
        self._label = ""
        self._begin = self._drawn = time.monotonic()

    def step(self, label: str, fraction: float) -> None:
        """Row `label` is under way; `fraction` of it is done."""
        now = time.monotonic()
        if self._tty:
            if label != self._label or now - self._drawn > _EVERY:
                self._draw(label, fraction)
                self._drawn = now
        elif label != self._label:
            print(f"[{self._done + 1}/{self._rows}] {label}", file=self._stream, flush=True)
        self._label = label

    def row_done(self) -> None:
        self._done += 1
        self._label = ""

    def note(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(f"pdxfer bench: {text}", file=self._stream, flush=True)

    def finish(self) -> None:
        self._clear()

    def _draw(self, label: str, fraction: float) -> None:
        columns = shutil.get_terminal_size().columns
        part = (self._done + min(fraction, 1.0)) / max(1, self._rows)
        width = 24
        filled = int(part * width)
        seconds = int(time.monotonic() - self._begin)
        bar = "#" * filled + "." * (width - filled)
        text = f"[{bar}] {self._done}/{self._rows} {seconds // 60}:{seconds % 60:02d} {label}"
        self._stream.write("\r\x1b[K" + text[: columns - 1])
        self._stream.flush()

    def _clear(self) -> None:
        if self._tty:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
