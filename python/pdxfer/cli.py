"""The ``pdxfer`` command: ``pdxfer bench``, ``pdxfer doctor``, ``pdxfer --version``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_USAGE = """usage: pdxfer COMMAND [options]

commands:
  bench       measure transfers on this machine or between two (pdxfer bench --help)
  doctor      what this machine has, and which transport each kind of peer would use (pdxfer doctor --help)
  --version   print the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; ``sys.argv[1:]`` when None.

    Returns:
        The exit code: 0 on success, 2 for a command that does not exist, else the command's own.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    command, rest = (args[0], args[1:]) if args else ("--help", [])
    try:
        return _dispatch(command, rest)
    except BrokenPipeError:  # `pdxfer doctor | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(command: str, rest: list[str]) -> int:
    # Imported late: each command pays for its own modules only.
    if command == "bench":
        from pdxfer import bench

        return bench.main(rest)
    if command == "doctor":
        from pdxfer import doctor

        return doctor.main(rest)
    if command in ("--version", "-V", "version"):
        from pdxfer import __version__

        print(f"pdxfer {__version__}")
        return 0
    if command in ("--help", "-h", "help"):
        print(_USAGE, end="")
        return 0
    print(f"pdxfer: there is no command {command!r}\n\n{_USAGE}", end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
