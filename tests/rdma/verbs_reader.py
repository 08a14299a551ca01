"""An independent peer: reads memory back over the wire through queue pairs of its own, with pyverbs, without pdxfer.

/usr/bin/python3 verbs_reader.py POOL BYTES OUT: registers the file POOL (of /dev/shm, which an engine has mapped too)
at rxe1 and reads it with RDMA READ into memory registered at rxe0, a piece at a time; writes what it read to OUT. Runs
with the distribution's python3-pyverbs, which is built for the distribution's Python.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import time

from pyverbs import enums as e
from pyverbs.addr import AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

PIECE = 1 << 20
GID_INDEX = 1  # RoCE v2, IPv4
ACCESS = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_READ
SECONDS = 10.0


class End:
    """One device's queue pair and what it needs."""

    def __init__(self, device: str) -> None:
        self.context = Context(name=device)
        self.pd = PD(self.context)
        self.cq = CQ(self.context, 16)
        capabilities = QPCap(max_send_wr=8, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        self.qp = QP(self.pd, QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self.cq, rcq=self.cq, cap=capabilities), QPAttr())

    def connect(self, other: End) -> None:
        attr = QPAttr(port_num=1)
        attr.qp_access_flags = ACCESS
        self.qp.to_init(attr)
        route = GlobalRoute(dgid=other.context.query_gid(1, GID_INDEX), sgid_index=GID_INDEX, hop_limit=64)
        attr = QPAttr(port_num=1)
        attr.path_mtu = e.IBV_MTU_4096
        attr.dest_qp_num = other.qp.qp_num
        attr.rq_psn = 17
        attr.max_dest_rd_atomic = 4
        attr.min_rnr_timer = 12
        attr.ah_attr = AHAttr(port_num=1, is_global=1, gr=route)
        attr.qp_access_flags = ACCESS
        self.qp.to_rtr(attr)
        attr.sq_psn = 17
        attr.timeout = 14
        attr.retry_cnt = 6
        attr.rnr_retry = 6
        attr.max_rd_atomic = 4
        self.qp.to_rts(attr)


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def main() -> None:
    path, size = sys.argv[1], int(sys.argv[2])
    near, far = End("rxe0"), End("rxe1")
    near.connect(far)
    far.connect(near)
    with open(path, "r+b") as file:
        pool = mmap.mmap(file.fileno(), size)
    into = mmap.mmap(-1, PIECE)
    there = MR(far.pd, size, ACCESS, address=address_of(pool))
    here = MR(near.pd, PIECE, ACCESS, address=address_of(into))
    with open(sys.argv[3], "wb") as out:
        for first in range(0, size, PIECE):
            length = min(PIECE, size - first)
            request = SendWR(wr_id=first, opcode=e.IBV_WR_RDMA_READ, num_sge=1, sg=[SGE(here.buf, length, here.lkey)])
            request.set_wr_rdma(there.rkey, address_of(pool) + first)
            near.qp.post_send(request)
            deadline = time.monotonic() + SECONDS
            done, completions = near.cq.poll()
            while not done:
                if time.monotonic() > deadline:
                    raise SystemExit(f"no completion of the read at {first} within {SECONDS:g} s")
                done, completions = near.cq.poll()
            if completions[0].status != e.IBV_WC_SUCCESS:
                raise SystemExit(f"the read at {first} failed: status {completions[0].status}")
            out.write(into[:length])


main()
