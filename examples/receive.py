"""The receiving end: registers a pool of pages, prints its address, and reports what arrives.

usage: receive.py [HOST]        then, on another terminal or machine: send.py ADDRESS
"""

import sys
import time

import numpy as np

import pdxfer

PAGES, PAGE_BYTES = 4096, 1024


def main() -> None:
    host = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1"
    pool = np.zeros((PAGES, PAGE_BYTES), np.uint8)
    with pdxfer.Engine(pdxfer.Config(host=host)) as engine:
        engine.register_memory(pool)
        print(engine.address, flush=True)
        while True:
            for arrival in engine.poll():
                if not arrival.ok:
                    print(f"batch {arrival.tag} failed: {arrival.status}")
                    continue
                pages = np.frombuffer(arrival.tail, np.int32)
                print(f"batch {arrival.tag}: pages {pages.tolist()} hold {pool[pages, 0].tolist()}", flush=True)
            time.sleep(0.001)


if __name__ == "__main__":
    main()
