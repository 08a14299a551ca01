"""The receiving end: a process that owns the destination pool and does what the sending end asks over the channel.

`python -m pdxfer.bench.remote FD` serves one session on an inherited, already authenticated socket, then exits; a
fresh process per session keeps one library's crash, environment and threads away from the next. It ends when the
channel does, so it never outlives the sending end.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from pdxfer.bench.channel import Channel
from pdxfer.bench.errors import BenchError, EndGone
from pdxfer.bench.study_session import StudySession


def spawn(sock: socket.socket, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process that serves one session on `sock`, which stays the caller's to close. stdout goes to stderr."""
    return subprocess.Popen(
        [sys.executable, "-m", "pdxfer.bench.remote", str(sock.fileno())],
        pass_fds=[sock.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        env={**os.environ, **environment},
    )


def main(argv: list[str]) -> int:
    sock = socket.socket(fileno=int(argv[0]))
    channel = Channel(sock, "the sending end")
    session = StudySession(channel)
    try:
        session.serve()
    except EndGone:
        return 0  # the end of an interrupted run; the sending end says what there is to say
    except BenchError as error:
        print(f"pdxfer bench (receiving end): {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        session.close()
        channel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
