"""``pdxfer doctor --listen`` and ``--connect``: what reaches what between two machines, and how fast.

The connecting end asks over bench's authenticated control channel; for every pair of ports (and once for tcp) both ends
make an engine that may use nothing else, and contiguous pages are moved and compared. A pair that fails keeps its error
in words and the others go on. One thread at each end; every wait is bounded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

import pdxfer
from pdxfer import _core, doctor_rdma
from pdxfer.bench.channel import Channel, Message, connect, listen, welcome
from pdxfer.bench.errors import BenchError, EndGone

PAGE_BYTES = 1 << 20
PAGES = 64
MEASURE_S = 0.5  # of a pair, after one pass that is not counted
PAIR_S = 30.0  # bound of one transfer
CONNECT_MS = 20000  # at least: what is asked is whether a pair works, and a machine may be busy
IDLE_S = 120.0  # the connecting end asks at least this often
Row = dict[str, Any]


def usable_nics(found: list[Row] | None = None) -> list[str]:
    """``DEVICE:PORT`` of every port that can be used; of this machine by default."""
    nics = doctor_rdma.list_nics(doctor_rdma.SYSFS) if found is None else found
    return [f"{nic['device']}:{nic['port']}" for nic in nics if nic["usable"]]


class End:
    """One end of a pair's engines. Owns the engine and its pool until `close`."""

    def __init__(self, host: str, transport: str, nic: str, secret: str) -> None:
        given = dict(pdxfer.Config().items())
        options = _without_devices(given["rdma"])
        rdma = ",".join([*options, f"devices={nic}"] if nic else options)
        patience = max(CONNECT_MS, int(given["connect_timeout_ms"]))
        config = pdxfer.Config(
            host=host, port=0, transports=transport, rdma=rdma, secret=secret, connect_timeout_ms=patience
        )
        self.engine = pdxfer.Engine(config)
        try:
            self.pool = np.zeros((PAGES, PAGE_BYTES), np.uint8)
            self.region = self.engine.register_memory(self.pool)
        except BaseException:
            self.engine.close()
            raise

    def close(self) -> None:
        self.engine.close()


def _without_devices(options: str) -> list[str]:
    return [item for item in options.split(",") if item and not item.startswith(("devices=", "gpu="))]


class Server:
    """The listening end of one visit. Each `do_...` answers one request of the same name."""

    def __init__(self, channel: Channel, secret: str, nics: list[str]) -> None:
        self._channel = channel
        self._secret = secret
        self._nics = nics
        self._end: End | None = None

    def serve(self) -> None:
        """Answer until the other end says goodbye or goes away."""
        try:
            while True:
                request = self._channel.receive(IDLE_S)
                name = str(request.pop("do", ""))
                if name == "goodbye":
                    self._channel.send({})
                    return
                self._channel.send(self._answer(name, request))
        except EndGone:
            return
        finally:
            self.do_close()

    def _answer(self, name: str, request: Message) -> Message:
        handlers: dict[str, Callable[..., Message]] = {
            "nics": self.do_nics,
            "open": self.do_open,
            "check": self.do_check,
            "close": self.do_close,
        }
        if name not in handlers:
            return {"error": f"request {name!r} is not known to doctor of pdxfer {pdxfer.__version__}"}
        try:
            return handlers[name](**request)
        except Exception as error:  # told to the other end, whose row it becomes
            return {"error": str(error) or type(error).__name__}

    def do_nics(self) -> Message:
        return {"nics": self._nics}

    def do_open(self, transport: str, nic: str) -> Message:
        if transport not in ("tcp", "rdma") or (nic and nic not in self._nics):
            raise BenchError(f"{transport} over {nic or 'no NIC'} is not offered here")
        self.do_close()
        self._end = End(self._channel.local_host(), transport, nic, self._secret)
        return {"address": self._end.engine.address}

    def do_check(self) -> Message:
        if self._end is None:
            raise BenchError("nothing is open")
        return {"crc": zlib.crc32(self._end.pool.data)}

    def do_close(self) -> Message:
        if self._end is not None:
            self._end.close()
        self._end = None
        return {}


def measure_pair(channel: Channel, secret: str, transport: str, local: str, remote: str) -> Row:
    """One row: ``transport``, ``local``, ``remote``, ``gb_per_s`` (null: failed), ``path``, ``error`` (null: none)."""
    row: Row = {"transport": transport, "local": local, "remote": remote, "gb_per_s": None, "path": "", "error": None}
    end: End | None = None
    try:
        address = channel.call("open", transport=transport, nic=remote)["address"]
        end = End(channel.local_host(), transport, local, secret)
        end.pool[:] = np.random.default_rng(len(local) + len(remote)).integers(0, 256, end.pool.shape, np.uint8)
        peer = end.engine.connect(address)
        rate = _rate(end, peer)
        row["path"] = end.engine.explain(peer)["path"]  # said by the worker once the link has carried something
        if channel.call("check")["crc"] != zlib.crc32(end.pool.data):
            raise BenchError("the bytes that arrived are not those that were sent: report this")
        row["gb_per_s"] = round(rate, 3)
    except EndGone:
        raise
    except (BenchError, pdxfer.PdxferError) as error:
        row["error"] = str(error)
    finally:
        if end is not None:
            end.close()
    channel.call("close")
    return row


def _rate(end: End, peer: Any) -> float:
    mine = pdxfer.KvLayout([(end.region, 0)], page_bytes=PAGE_BYTES, slots=PAGES)
    theirs = pdxfer.KvLayout([(peer.regions[0], 0)], page_bytes=PAGE_BYTES, slots=PAGES)
    pages = np.arange(PAGES, dtype=np.int32)
    plan = pdxfer.make_plan(mine, theirs, pages, pages)
    end.engine.transfer(peer, plan, timeout=PAIR_S)
    begin, moved = time.perf_counter(), 0
    while time.perf_counter() - begin < MEASURE_S:
        end.engine.transfer(peer, plan, timeout=PAIR_S)
        moved += PAGES * PAGE_BYTES
    return moved / (time.perf_counter() - begin) / 1e9


def matrix(channel: Channel, secret: str, local_nics: list[str]) -> list[Row]:
    """tcp, then every port here with every port there. `EndGone` when the other end vanishes."""
    rows = [measure_pair(channel, secret, "tcp", "", "")]
    remote_nics = [str(name) for name in channel.call("nics")["nics"]]
    missing = ""
    if not any(one["name"] == "rdma" for one in _core.transports()):
        missing = "this version of pdxfer has no rdma transport"
    elif not local_nics:
        missing = "no usable RDMA port on this machine: pdxfer doctor says why"
    elif not remote_nics:
        missing = "no usable RDMA port on the other machine: run pdxfer doctor there"
    if missing:
        none: Row = {"transport": "rdma", "local": "", "remote": "", "gb_per_s": None, "path": "", "error": missing}
        return [*rows, none]
    return rows + [measure_pair(channel, secret, "rdma", a, b) for a in local_nics for b in remote_nics]


def render(rows: list[Row]) -> str:
    """A table of ports here against ports there in GB/s, and the reason of every pair that failed."""
    tcp = rows[0]
    lines = ["tcp: " + (f"{tcp['gb_per_s']:.2f} GB/s" if tcp["error"] is None else f"FAILED: {tcp['error']}")]
    cells = {(row["local"], row["remote"]): row for row in rows[1:] if row["local"]}
    here, there = list(dict.fromkeys(a for a, _ in cells)), list(dict.fromkeys(b for _, b in cells))
    if cells:
        lines += ["", "rdma, GB/s; rows: ports here, columns: ports there"]
        width = max(len(name) for name in [*here, *there, "FAILED"])
        lines.append("  ".join([" " * width, *(f"{name:>{width}}" for name in there)]))
        for a in here:
            texts = [f"{cells[a, b]['gb_per_s']:.2f}" if cells[a, b]["error"] is None else "FAILED" for b in there]
            lines.append("  ".join([f"{a:<{width}}", *(f"{text:>{width}}" for text in texts)]))
    for row in rows[1:]:
        if row["error"] is not None:
            pair = f" {row['local']} to {row['remote']}" if row["local"] else ""
            lines.append(f"rdma{pair}: {row['error']}")
    return "\n".join(lines)


def run_connect(args: argparse.Namespace) -> int:
    """Measure and print; 0 when every pair worked, 1 when one failed, 2 when the other end cannot be reached."""
    secret = str(args.secret or os.environ.get("PDXFER_SECRET", ""))
    try:
        channel = connect(args.connect, secret, pdxfer.__version__, program="doctor")
        try:
            rows = matrix(channel, secret, usable_nics())
            channel.call("goodbye")
        finally:
            channel.close()
    except BenchError as error:
        print(f"pdxfer doctor: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"schema": 1, "pairs": rows}, indent=2) if args.json else render(rows))
    return int(any(row["error"] is not None for row in rows if row["local"] or row["transport"] == "tcp"))


def run_listen(args: argparse.Namespace) -> int:
    """Serve one visitor after the other until nobody came for ``--wait`` seconds."""
    secret = str(args.secret or os.environ.get("PDXFER_SECRET", ""))
    try:
        sock = listen(args.listen)
    except BenchError as error:
        print(f"pdxfer doctor: {error}", file=sys.stderr)
        return 2
    with sock:
        host, port = sock.getsockname()[:2]
        print(f"pdxfer doctor: listening on {host} port {port}", file=sys.stderr, flush=True)
        if not secret:
            print("pdxfer doctor: no --secret: anyone who reaches this port can use it", file=sys.stderr, flush=True)
        sock.settimeout(args.wait)
        while True:
            try:
                accepted, peer = sock.accept()
            except TimeoutError:
                print(f"pdxfer doctor: nobody came for {args.wait:g} s", file=sys.stderr)
                return 0
            who = f"the doctor at {peer[0]}:{peer[1]}"
            try:
                channel = welcome(accepted, who, secret, pdxfer.__version__)
                try:
                    Server(channel, secret, usable_nics()).serve()
                finally:
                    channel.close()
            except BenchError as error:
                print(f"pdxfer doctor: {who}: {error}", file=sys.stderr, flush=True)
