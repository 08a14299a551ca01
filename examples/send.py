"""The sending end: moves three scattered pages into the pool of receive.py and tells it which they were.

usage: send.py ADDRESS          the address that receive.py printed
"""

import sys

import numpy as np

import pdxfer

PAGES, PAGE_BYTES = 4096, 1024


def main() -> None:
    pool = np.repeat(np.arange(PAGES, dtype=np.uint8), PAGE_BYTES).reshape(PAGES, PAGE_BYTES)
    source, destination = np.array([7, 8, 9], np.int32), np.array([100, 3, 4], np.int32)
    with pdxfer.Engine() as engine:
        region = engine.register_memory(pool)
        peer = engine.connect(sys.argv[1])
        mine = pdxfer.KvLayout([(region, 0)], page_bytes=PAGE_BYTES, slots=PAGES)
        theirs = pdxfer.KvLayout([(peer.regions[0], 0)], page_bytes=PAGE_BYTES, slots=PAGES)
        engine.transfer(peer, pdxfer.make_plan(mine, theirs, source, destination), tag=1, tail=destination.tobytes())
        print(f"moved over {peer.transport}: {engine.explain(peer)['path']}")


if __name__ == "__main__":
    main()
