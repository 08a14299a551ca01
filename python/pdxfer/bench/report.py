"""Rows to people and files: the table, and JSON that is either whole or not there."""

from __future__ import annotations

import json
import os
import stat
import tempfile
import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

from pdxfer.bench.errors import BenchError

Row = dict[str, Any]
RESERVE = 256 << 10  # bytes claimed before a run, so that a full disk is found first
WIDTH = 120

_COLUMNS = (  # heading, width
    ("MB", 7),
    ("GB/s", 7),
    ("p50 ms", 9),
    ("p99 ms", 9),
    ("plan us", 8),
    ("ceiling", 8),
    ("% of it", 8),
    ("checked", 8),
)
_NAME = WIDTH - sum(width for _, width in _COLUMNS) - 12


def pair_key(row: Row) -> tuple[Any, ...]:
    """Rows with the same key moved the same pages over the same kind of path."""
    return (row["transport"], row["label"], row["tokens"], row["bytes"], row.get("sm_budget"))


def arrange(rows: list[Row]) -> list[Row]:
    """pdxfer's rows by transport, each followed by its peers', which get `pdxfer_times`: how much faster pdxfer is."""
    own = [row for row in rows if not row["peer"]]
    ordered: list[Row] = []
    for transport in dict.fromkeys(row["transport"] for row in rows):
        for row in [r for r in own if r["transport"] == transport]:
            ordered.append(row)
            for peer in [r for r in rows if r["peer"] and pair_key(r) == pair_key(row)]:
                both = row["gbps"] and peer["gbps"]
                peer["pdxfer_times"] = row["gbps"] / peer["gbps"] if both else None
                ordered.append(peer)
    return ordered + [row for row in rows if all(row is not other for other in ordered)]


def table(rows: list[Row]) -> str:
    """The rows as aligned text, at most 120 columns, one section per transport."""
    if not rows:
        return "no rows"
    lines: list[str] = []
    for transport, group in groupby(arrange(rows), key=lambda row: row["transport"]):
        section = list(group)
        lines += ["", *_heading(transport, section)]
        head = f"{'workload (pairs x runs)':<{_NAME}}" + "".join(f"{name:>{width}}" for name, width in _COLUMNS)
        lines += [head + (f"{'pdxfer is':>12}" if any(row["peer"] for row in section) else ""), "-" * WIDTH]
        lines += [line for row in section for line in _lines(row)]
    return "\n".join(lines[1:])


def _heading(transport: str, section: list[Row]) -> list[str]:
    """Which path was chosen and why, and what the ceiling is."""
    own = next((row for row in section if not row["peer"] and not row["failed"]), section[0])
    text = f"{transport}: {own['path'] or 'no path'}"
    if own["reason"]:
        text += f" ({own['reason']})"
    lines = _wrapped(text)
    kinds = [row["ceiling_kind"] for row in section if row["ceiling_kind"] and not row["peer"]]
    if kinds:
        one = [row["ceiling_1stream_gbps"] for row in section if row.get("ceiling_1stream_gbps") and not row["peer"]]
        single = f"; one stream alone {min(one):.2f} to {max(one):.2f} GB/s" if one else ""
        lines += _wrapped(f"ceiling, measured beside every repeat: {kinds[0]}{single}")
    return lines


def _lines(row: Row) -> list[str]:
    name = f"  {row['peer']}" if row["peer"] else f"{row['label']} ({row['pairs']} x {row['runs']})"
    if row["peer"] and row.get("note"):
        name += f", {row['note']}"
    if not row["peer"] and row.get("sm_budget"):
        name += f", {row['sm_budget']} blocks"
    if row["failed"]:
        return _wrapped(f"{name}: FAILED: {row['failed']}", indent="      ")
    checked = "yes" if row["verified"] else ("WRONG" if row["wrong"] else "NO")
    ceiling = row["ceiling_gbps"]
    cells = (
        f"{row['bytes'] / 1e6:.1f}",
        _number(row["gbps"]),
        f"{row['p50_ms']:.2f}",
        f"{row['p99_ms']:.2f}",
        f"{row['plan_us']:.0f}",
        _number(ceiling) if ceiling else "-",
        f"{row['percent_of_ceiling']:.0f}%" if ceiling else "-",
        checked,
    )
    text = "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    times = row.get("pdxfer_times")
    lines = [name] if len(name) > _NAME else []
    lines.append(f"{'' if lines else name:<{_NAME}}{text}" + (f"{times:>11.1f}x" if times else ""))
    if row.get("burst"):
        lines.append(_back_to_back(row))
    return lines + (_wrapped(f"      WRONG: {row['wrong']}", indent="      ") if row["wrong"] else [])


def _back_to_back(row: Row) -> str:
    """What a row whose transfers follow one another says besides."""
    text = f"after a pause {row['idle_ms']:.2f} ms, {_number(row['idle_gbps'])} GB/s"
    if row["notified_ms"]:
        share = f", {row['notified_percent']:.0f}% of it" if row["notified_percent"] else ""
        told = f"submit to arrival {row['notified_ms']:.2f} ms, {_number(row['notified_gbps'])} GB/s{share}"
        text = f"{told}; {text}"
    return f"      {row['burst']} back to back; {text}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent)


class JsonFile:
    """A file that gets all rows at once: written beside `path`, then renamed over it.

    Made before a run, so that a directory that does not exist, cannot be written or is full is an error then and not
    an hour later. What is not a regular file (a pipe, a device) is written in place.

    Raises:
        BenchError: the file cannot be made; the text says why.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._temporary: str | None = None
        try:
            if self._path.exists() and not stat.S_ISREG(self._path.stat().st_mode):
                if self._path.is_dir():
                    raise BenchError(f"--json {path}: is a directory")
                with self._path.open("wb"):
                    return
            descriptor, self._temporary = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE)
            finally:
                os.close(descriptor)
        except OSError as error:
            self.discard()
            raise BenchError(f"--json {path}: cannot write there: {error.strerror or error}") from None

    def write(self, rows: list[Row]) -> None:
        data = (json.dumps(rows, indent=1) + "\n").encode()
        try:
            with open(self._temporary or self._path, "wb") as file:
                file.write(data)
                file.flush()
                if self._temporary:
                    os.fsync(file.fileno())
            if self._temporary:
                os.chmod(self._temporary, 0o644)
                os.replace(self._temporary, self._path)
                self._temporary = None
        except OSError as error:
            self.discard()
            raise BenchError(f"--json {self._path}: not written: {error.strerror or error}") from None

    def discard(self) -> None:
        """Leave nothing behind. Safe to call twice, and after write."""
        if self._temporary is not None:
            Path(self._temporary).unlink(missing_ok=True)
            self._temporary = None
