"""How long a library takes to say that its receiver was killed, over RDMA in the test bed.

    tests/rdma/run PYTHON tests/rdma/killed_receiver.py OUT.json pdxfer [nixl] [mooncake]

Each library moves random 1 KiB pages from rxe0 to rxe1 over and over; half a second in, the receiving process gets
SIGKILL. Written: seconds from the signal to the error that the sending call reported, or null after WAIT seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from bed import FAR, NEAR, require

from pdxfer.bench.memory import allocate, fill_guard
from pdxfer.bench.movers import Options, make_receiver, make_sender
from pdxfer.bench.workloads import Workload, make_pages

WAIT = 55.0
WORK = Workload("Qwen2.5-7B", 1, 64, "random", 256)
DEVICES = {"send": "rxe0", "receive": "rxe1"}


def options(end: str, host: str) -> Options:
    settings = {"rdma": f"devices={DEVICES[end]}"}
    return Options("rdma", settings, host=host, remote_device=0)  # host memory: NIXL finds it as that of device 0 alone


def receive(library: str, link: Connection) -> None:
    geometry = WORK.geometry()
    pool = allocate(geometry.buffers, geometry.dst_buffer)
    fill_guard(pool)
    receiver = make_receiver(library, options("receive", FAR))
    link.send(receiver.open(pool))
    while True:
        time.sleep(1)  # until the signal


def send(library: str, remote: dict[str, Any], link: Connection) -> None:
    geometry = WORK.geometry()
    pool = allocate(geometry.buffers, geometry.src_buffer)
    sender = make_sender(library, options("send", NEAR))
    sender.connect(pool, remote)
    sender.prepare(geometry, *make_pages(WORK))
    number = 0
    try:
        while True:
            sender.transfer(number)
            number += 1
            if number == 4:
                link.send("moving")
    except Exception as error:
        link.send((time.monotonic(), f"{type(error).__name__}: {error}"))
    os._exit(0)  # libraries whose peer is gone may hang in their destructors


def one(library: str) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    (from_receiver, receiver_link), (from_sender, sender_link) = context.Pipe(), context.Pipe()
    receiver = context.Process(target=receive, args=(library, receiver_link), daemon=True)
    receiver.start()
    sender = None
    try:
        if not from_receiver.poll(60):
            raise SystemExit(f"{library}: the receiver did not start")
        sender = context.Process(target=send, args=(library, from_receiver.recv(), sender_link), daemon=True)
        sender.start()
        if not from_sender.poll(60):
            raise SystemExit(f"{library}: no transfer completed before the kill")
        if (first := from_sender.recv()) != "moving":
            raise SystemExit(f"{library}: failed before the kill: {first}")
        time.sleep(0.5)
        assert receiver.pid is not None
        os.kill(receiver.pid, signal.SIGKILL)
        killed = time.monotonic()
        if not from_sender.poll(WAIT):
            return {"library": library, "seconds": None, "error": f"nothing reported within {WAIT:g} s"}
        moment, text = from_sender.recv()
        return {"library": library, "seconds": round(moment - killed, 3), "error": text}
    finally:
        for process in (receiver, sender):
            if process is not None:
                process.kill()
                process.join(10)


def main() -> None:
    require()
    rows = []
    for library in sys.argv[2:]:
        try:
            rows.append(one(library))
        except SystemExit as failed:  # another library's trouble is a line of the table, ours is an error
            if library == "pdxfer":
                raise
            rows.append({"library": library, "seconds": None, "error": str(failed)})
    for row in rows:
        print(row, flush=True)
    with open(sys.argv[1], "w") as out:
        json.dump(rows, out, indent=1)


if __name__ == "__main__":
    main()
