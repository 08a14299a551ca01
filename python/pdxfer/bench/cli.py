"""One run of the bench: the sending end and what it starts, or the listening end."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from pdxfer import __version__
from pdxfer.bench import studies
from pdxfer.bench.arguments import (
    Memory,
    burst_of,
    devices_of,
    parser,
    settings_of,
    studies_of,
    transports_of,
    with_budget,
    workloads,
)
from pdxfer.bench.channel import Channel, listen, welcome
from pdxfer.bench.cuda import Cuda
from pdxfer.bench.errors import BenchError, describe
from pdxfer.bench.memory import available_memory
from pdxfer.bench.movers import DEVICE_PEERS, PEERS, Options, Path, mapped
from pdxfer.bench.progress import Progress
from pdxfer.bench.remote import spawn
from pdxfer.bench.report import JsonFile, table
from pdxfer.bench.runner import Row, Runner, Settings, failed_figures
from pdxfer.bench.study_session import StudySession
from pdxfer.bench.worker import RECEIVER_DEVICES, Job, missing, open_channel, run_peer, stop
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
    known = DEVICE_PEERS if args.memory == "device" else PEERS
    for name in args.peer:
        if name not in (*known, "all"):
            raise BenchError(f"--peer {name}: moves device memory alone, give --memory device")
    libraries = list(dict.fromkeys(name for peer in args.peer for name in (known if peer == "all" else [peer])))
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
        studied = [row for row in rows if row.get("study")]
        measured = [row for row in rows if not row.get("study")]
        print(table(measured), flush=True)
        if studied:
            print(f"\n{studies.text(studied)}", flush=True)
        if args.no_verify:
            _loudly("NOT VERIFIED: --no-verify was given, nobody looked at what arrived")
        if json_file:
            json_file.write(rows)
        if args.plot and measured:
            plot.draw(measured, args.plot)
    finally:
        if json_file:
            json_file.discard()
    if interrupted:
        return 130
    return 0 if _all_right(rows, verified=not args.no_verify) else 1


def _all_right(rows: list[Row], verified: bool) -> bool:
    own = [row for row in rows if not row["peer"] and row.get("study") != "interference"]
    return bool(own) and all(not row["failed"] and (row["verified"] or not verified) for row in own)


def _loudly(text: str) -> None:
    line = "!" * (len(text) + 8)
    print(f"{line}\n!!! {text} !!!\n{line}", file=sys.stderr, flush=True)


def _collect(
    args: argparse.Namespace, transports: list[str], config: dict[str, str], libraries: list[str], rows: list[Row]
) -> None:
    """Fill `rows`: pdxfer's own first, then each library's. Rows are there as soon as they are measured."""
    chosen = studies_of(args)
    secret = _secret(args) or ("" if args.connect else secrets.token_hex(16))
    settings = Settings(
        repeats=args.repeats,
        least=min(3, args.repeats),
        row_seconds=args.row_seconds,
        verify=not args.no_verify,
        ceiling=not args.no_ceiling,
        burst=burst_of(args),
    )
    options = _options(args, transports, config, secret)
    channel, process = open_channel(options[0], args.connect, __version__)
    try:
        works, notes = workloads(args, transports, _memory(args, options[0], channel))
        usable = [name for name in libraries if not missing(name)]
        budgets = len(args.sm_budget or [None])
        total = sum(len(works[o.transport]) * (budgets + _uses(usable, o, transports)) for o in options[::budgets])
        progress = Progress(total)
        for note in notes + [why for why in map(missing, libraries) if why]:
            progress.note(note)
        if not settings.verify:
            _loudly("--no-verify: nobody will look at what arrives")
        runner = Runner(channel, settings, _stepper(progress, ""))
        _own_rows(runner, options, works, rows, progress)
        for name in chosen:
            _study(name, runner, channel, options, works, rows)
        runner.goodbye()
    finally:
        channel.close()
        stop(process)
    peer_settings = replace(
        settings, repeats=min(PEER_REPEATS, args.repeats), warmups=3, least=1, row_seconds=PEER_ROW_SECONDS
    )
    for name in usable:
        for option in options[::budgets]:
            if not _uses([name], option, transports):
                continue
            job = Job(name, option, peer_settings, works[option.transport], args.connect, __version__)
            for row in run_peer(job, _stepper(progress, f"{name} "), progress.note):
                rows.append(row)
                progress.row_done()
    progress.finish()


def _options(args: argparse.Namespace, transports: list[str], config: dict[str, str], secret: str) -> list[Options]:
    """What engines are to be made: one per transport and SM budget."""
    source, target = devices_of(args)
    if args.isolate:
        # Before anything in this process asks the driver. A set that was given from outside is what is counted in.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(max(source, target) + 1)]
        if max(source, target) >= len(names):
            raise BenchError(f"--device {args.device}: CUDA_VISIBLE_DEVICES={visible} has {len(names)}")
        os.environ["CUDA_VISIBLE_DEVICES"], os.environ[RECEIVER_DEVICES] = names[source], names[target]
        source, target = 0, 0
    return [
        Options(
            transport,
            with_budget(config, budget),
            secret=secret,
            memory=args.memory,
            device=source,
            remote_device=target,
            isolate=args.isolate,
        )
        for transport in transports
        for budget in args.sm_budget or [None]
    ]


def _memory(args: argparse.Namespace, options: Options, channel: Channel) -> Memory:
    """What the pools may use: of the two GPUs, or of the machines."""
    if options.memory == "device":
        here, there = Cuda(options.device), channel.call("device", ordinal=options.remote_device)
        shared = options.device == options.remote_device and not options.isolate
        return Memory(here.memory()[0], None if shared else int(there["free"]))
    sender, receiver = available_memory(), int(channel.call("hello")["available"])
    return Memory(sender, receiver if args.connect else None)


def _uses(libraries: list[str], options: Options, transports: list[str]) -> int:
    """How many of the libraries run for this transport.

    On host memory Mooncake has TCP and RDMA, so shm rows are not given to it; NCCL and the driver's copies: NVLink, and
    the latter only into mapped memory.
    """
    transport = options.transport
    if options.memory == "host":
        return sum(name != "mooncake" or transport in ("tcp", "rdma") or "tcp" not in transports for name in libraries)
    if transport != "cuda_ipc":
        return sum(name in ("nixl", "mooncake") for name in libraries)
    return sum(name != "memcpy-batch" or mapped(options) for name in libraries)


def _study(
    name: str,
    runner: Runner,
    channel: Channel,
    options: list[Options],
    works: dict[str, list[Workload]],
    rows: list[Row],
) -> None:
    """One study with the first workload of every transport and budget."""
    for option in options:
        study = studies.Studies(runner, channel, StudySession(channel))
        work = works[option.transport][0]
        try:
            rows.extend(study.run(name, option, work))
        except Exception as error:
            runner.require_receiver(error)
            head = runner.head("pdxfer", Path(option.transport, ""), option, work)
            rows.append(head | failed_figures(describe(error)) | {"study": name})


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
    # Tables read better in the order in which rows were asked for.
    order = [(option.transport, work.label) for option in options for work in works[option.transport]]
    rows.sort(key=lambda row: next((i for i, (_, label) in enumerate(order) if label == row["label"]), len(order)))
