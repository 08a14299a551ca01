"""The rows as a picture: a panel per transport, a bar per library, a line where the machine's ceiling is.

matplotlib is an optional extra; `require` says so before a run instead of after it.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from pdxfer.bench.errors import BenchError
from pdxfer.bench.report import Row, arrange, pair_key

_COLOURS = {"pdxfer": "#1f6fb4", "nixl": "#7fb800", "mooncake": "#f0a202", "nccl": "#8e6bbf", "memcpy-batch": "#9aa3ab"}
_INK, _FAINT, _CEILING = "#22272e", "#6b737c", "#c0392b"
_BAR = 0.26  # inches of one bar


def require(path: str) -> None:
    """Raises BenchError when no plot could be written to `path` after the run."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError('--plot needs matplotlib: pip install "pdxfer[plot]"')
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise BenchError(f"--plot {path}: expected a name that ends in .png, .svg or .pdf")
    if not Path(path).absolute().parent.is_dir():
        raise BenchError(f"--plot {path}: there is no directory {Path(path).absolute().parent}")


def draw(rows: list[Row], path: str) -> None:
    """Write the picture.

    Raises:
        BenchError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels = _panels(rows)
    bars = max(sum(1 + len(peers) for _, peers in panel) + 0.8 * len(panel) for _, panel in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels) + 0.6, 1.5 + _BAR * bars), squeeze=False)
    for axis, (transport, panel) in zip(axes[0], panels, strict=True):
        _panel(axis, transport, panel)
    handles: list[Artist] = [Patch(color=_COLOURS[name]) for name in _libraries(rows)]
    handles.append(Line2D([0], [0], color=_CEILING, linewidth=2))
    figure.legend(
        handles, [*_libraries(rows), "ceiling"], loc="lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    machine = rows[0]["machine"]
    where = (
        f"two {rows[0]['gpu']}" if rows[0].get("gpu") else f"host memory, {machine['cpu']}, {machine['cores']} cores"
    )
    inch = 1 / figure.get_figheight()
    figure.suptitle(f"KV pages between two processes, {where}", y=1 - 0.1 * inch, fontsize=11, color=_INK)
    figure.tight_layout(rect=(0, 0.35 * inch, 1, 1))
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise BenchError(f"--plot {path}: {error.strerror or error}") from None
    finally:
        plt.close(figure)


def _libraries(rows: list[Row]) -> list[str]:
    present = {row["peer"] or "pdxfer" for row in rows}
    return [name for name in _COLOURS if name in present]


def _panels(rows: list[Row]) -> list[tuple[str, list[tuple[Row, list[Row]]]]]:
    """(transport, [(pdxfer's row, rows of its peers)]) in the order of the table."""
    ordered = arrange(rows)
    out: dict[str, list[tuple[Row, list[Row]]]] = {}
    for row in ordered:
        if not row["peer"]:
            peers = [r for r in ordered if r["peer"] and pair_key(r) == pair_key(row)]
            out.setdefault(row["transport"], []).append((row, peers))
    return list(out.items()) or [("no rows", [])]


def _panel(axis: Any, transport: str, panel: list[tuple[Row, list[Row]]]) -> None:
    place, ticks, names = 0.0, [], []
    figures = [row["ceiling_gbps"] or 0.0 for row, _ in panel]
    top = max([0.1, *figures, *(r["gbps"] or 0.0 for row, peers in panel for r in (row, *peers))])
    for row, peers in panel:
        group = [row, *peers]
        for offset, member in enumerate(group):
            _bar(axis, place + offset, member)
        if row["ceiling_gbps"]:
            axis.plot(
                [row["ceiling_gbps"]] * 2,
                [place - 0.5, place + len(group) - 0.5],
                color=_CEILING,
                linewidth=2,
                solid_capstyle="butt",
                zorder=3,
            )
        ticks.append(place + (len(group) - 1) / 2)
        names.append(row["label"] + (f", {row['sm_budget']} blocks" if row.get("sm_budget") else ""))
        place += len(group) + 0.8
    axis.set_yticks(ticks, names, fontsize=9, color=_INK)
    axis.margins(y=0.02)
    axis.invert_yaxis()
    axis.set_xlim(0, top * 1.03)
    axis.set_xlabel("GB/s, host call to completion", fontsize=9, color=_INK)
    axis.set_title(transport, fontsize=10, loc="left", color=_INK, fontweight="bold")
    axis.set_title("GB/s, % of ceiling", fontsize=8, loc="right", color=_FAINT)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", colors=_INK, labelsize=8)
    axis.grid(axis="x", color="#e1e4e8", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _bar(axis: Any, place: float, row: Row) -> None:
    value = row["gbps"] or 0.0
    axis.barh(place, value, height=0.86, color=_COLOURS[row["peer"] or "pdxfer"], zorder=2)
    text = "failed" if row["failed"] else f"{value:.{max(0, min(3, 1 - math.floor(math.log10(value))))}f}"
    if not row["peer"] and row["percent_of_ceiling"]:
        text += f"  {row['percent_of_ceiling']:.0f}%"
    # A column at the right edge: beside the bars the ceilings' lines would cross the figures.
    axis.annotate(
        text,
        (1.0, place),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=_INK if not row["peer"] else _FAINT,
        fontweight="bold" if not row["peer"] else "normal",
    )
