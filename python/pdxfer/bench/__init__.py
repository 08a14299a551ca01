"""`pdxfer bench`: how fast pages move between two processes, beside what the machine can do and what others do.

    pdxfer bench                                  this machine, both ends, the default table
    pdxfer bench --listen 0.0.0.0:4790 --secret S the receiving end, on one machine
    pdxfer bench --connect HOST:4790 --secret S   the sending end, on another

docs/bench.md explains every option and figure. Modules: workloads (what is moved), memory and verify (the bytes),
channel and remote (the receiving end), runner (the sending end), ceiling, own and peers (libraries), report and plot.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench.

    Args:
        argv: arguments after `bench`; those of the process when None.

    Returns:
        0 when every row of pdxfer was measured and verified, 1 when one was not, 2 when the run could not be made,
        130 when it was interrupted.
    """
    from pdxfer.bench.cli import run  # late, so that `import pdxfer.bench` costs nothing

    return run(argv)
