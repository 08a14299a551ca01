"""One run of the bench: the sending end and what it starts, or the listening end."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from pdxfer import __version__
from pdxfer.bench.arguments import Memory, parser, settings_of, transports_of, workloads
from pdxfer.bench.channel import listen, welcome
from pdxfer.bench.errors import BenchError
from pdxfer.bench.memory import available_memory
from pdxfer.bench.movers import PEERS, Options
from pdxfer.bench.progress import Progress
from pdxfer.bench.remote import spawn
from pdxfer.bench.report import JsonFile, table
from pdxfer.bench.runner import Row, Runner, Settings
from pdxfer.bench.worker import Job, missing, open_channel, run_peer, stop
from pdxfer.bench.workloads import Workload

PEER_REPEATS, PEER_ROW_SECONDS = 9, 8.0
SESSION_SECONDS = 6 * 3600.0


def run(argv: Sequence[str] | None) -> int:
    """The exit code; see `pdxfer.bench.main`."""
    args = parser().parse_args(None if argv is None else list(argv))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # rows measured so far are kept then, too
    try:
        if args.listen is not None and args.connect is not None:
            raise BenchError("--listen and --connect are the two ends: give one of them")
        return _listen(args) if args.listen is not None else _measure(args)
    except BenchError as error:
        print(f"pdxfer bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _secret(args: argparse.Namespace) -> str:
    return str(args.secret or os.environ.get("PDXFER_SECRET", ""))


def _listen(args: argparse.Namespace) -> int:
    """Serve one sending end after the other, each in a process of its own."""
    address = args.listen if ":" in args.listen or not args.listen.isdigit() else f":{args.listen}"
    secret = _secret(args)
    with listen(address) as sock:
        host, port = sock.getsockname()[:2]
        print(f"pdxfer bench: listening on {host} port {port}, version {__version__}", file=sys.stderr, flush=True)
        if not secret:
            print("pdxfer bench: no --secret: anyone who reaches this port can use it", file=sys.stderr, flush=True)
        sock.settimeout(args.wait)
        while True:
            try:
                accepted, peer = sock.accept()
            except TimeoutError:
                print(f"pdxfer bench: nobody came for {args.wait:g} s", file=sys.stderr)
                return 0
            _serve(accepted, f"{peer[0]}:{peer[1]}", secret)


def _serve(accepted: socket.socket, peer: str, secret: str) -> None:
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        channel = welcome(accepted, f"the sending end at {peer}", secret, __version__)
    except BenchError as error:
        print(f"pdxfer bench: refused {peer}: {error}", file=sys.stderr, flush=True)
        return
    print(f"pdxfer bench: serving {peer}", file=sys.stderr, flush=True)
    accepted.settimeout(None)
    try:
        process = spawn(accepted, {"PDXFER_SECRET": secret} if secret else {})
    finally:
        channel.close()
    try:
        stop(process, SESSION_SECONDS)
    except BaseException:
        process.kill()
        process.wait()
        raise


def _measure(args: argparse.Namespace) -> int:
    if args.plot:
        from pdxfer.bench import plot

        plot.require(args.plot)
    transports, config = transports_of(args), settings_of(args)
    libraries = list(dict.fromkeys(name for peer in args.peer for name in (PEERS if peer == "all" else [peer])))
    json_file = JsonFile(args.json) if args.json else None
    rows: list[Row] = []
    interrupted = False
    try:
        try:
            _collect(args, transports, config, libraries, rows)
        except KeyboardInterrupt:
            interrupted = True
            print("pdxfer bench: interrupted; rows so far:", file=sys.stderr)
        except BenchError as error:
            if not rows:
                raise
            print(f"pdxfer bench: {error}; rows so far:", file=sys.stderr)
            interrupted = True
        print(table(rows), flush=True)
        if args.no_verify:
            _loudly("NOT VERIFIED: --no-verify was given, nobody looked at what arrived")
        if json_file:
            json_file.write(rows)
        if args.plot and rows:
            plot.draw(rows, args.plot)
    finally:
        if json_file:
            json_file.discard()
    if interrupted:
        return 130
    return 0 if _all_right(rows, verified=not args.no_verify) else 1


def _all_right(rows: list[Row], verified: bool) -> bool:
    own = [row for row in rows if not row["peer"]]
    return bool(own) and all(not row["failed"] and (row["verified"] or not verified) for row in own)


def _loudly(text: str) -> None:
    line = "!" * (len(text) + 8)
    print(f"{line}\n!!! {text} !!!\n{line}", file=sys.stderr, flush=True)


def _collect(
    args: argparse.Namespace, transports: list[str], config: dict[str, str], libraries: list[str], rows: list[Row]
) -> None:
    """Fill `rows`: pdxfer's own first, then each library's. Rows are there as soon as they are measured."""
    secret = _secret(args) or ("" if args.connect else secrets.token_hex(16))
    settings = Settings(
        repeats=args.repeats,
        least=min(3, args.repeats),
        row_seconds=args.row_seconds,
        verify=not args.no_verify,
        ceiling=not args.no_ceiling,
    )
    options = [Options(transport, config, secret=secret) for transport in transports]
    channel, process = open_channel(options[0], args.connect, __version__)
    try:
        sender, receiver = available_memory(), int(channel.call("hello")["available"])
        works, notes = workloads(args, transports, Memory(sender, receiver if args.connect else None))
        usable = [name for name in libraries if not missing(name)]
        progress = Progress(sum(len(w) for t in transports for w in [works[t]] * (1 + _uses(usable, t, transports))))
        for note in notes + [why for why in map(missing, libraries) if why]:
            progress.note(note)
        if not settings.verify:
            _loudly("--no-verify: nobody will look at what arrives")
        _own_rows(Runner(channel, settings, _stepper(progress, "")), options, works, rows, progress)
    finally:
        channel.close()
        stop(process)
    peer_settings = Settings(min(PEER_REPEATS, args.repeats), 3, 1, PEER_ROW_SECONDS, settings.verify, settings.ceiling)
    for name in usable:
        for option in options:
            if not _uses([name], option.transport, transports):
                continue
            job = Job(name, option, peer_settings, works[option.transport], args.connect, __version__)
            for row in run_peer(job, _stepper(progress, f"{name} "), progress.note):
                rows.append(row)
                progress.row_done()
    progress.finish()


def _uses(libraries: list[str], transport: str, transports: list[str]) -> int:
    """How many of the libraries run for this transport. Mooncake has TCP and RDMA, so shm rows are not given to it."""
    return sum(name != "mooncake" or transport in ("tcp", "rdma") or "tcp" not in transports for name in libraries)


def _stepper(progress: Progress, prefix: str) -> Callable[[Workload, float], None]:
    return lambda work, fraction: progress.step(f"{prefix}{work.label}", fraction)


def _own_rows(
    runner: Runner, options: list[Options], works: dict[str, list[Workload]], rows: list[Row], progress: Progress
) -> None:
    """Pool by pool, so that each is made once; within a pool one transport after the other."""
    keys = dict.fromkeys(work.pool_key for option in options for work in works[option.transport])
    for key in keys:
        for option in options:
            mine = [work for work in works[option.transport] if work.pool_key == key]
            for row in runner.run("pdxfer", option, mine):
                rows.append(row)
                progress.row_done()
    runner.goodbye()
    # Tables read better in the order in which rows were asked for.
    order = [(option.transport, work.label) for option in options for work in works[option.transport]]
    rows.sort(key=lambda row: next((i for i, (_, label) in enumerate(order) if label == row["label"]), len(order)))
