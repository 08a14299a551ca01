"""What pdxfer wrote, read back by pyverbs through its own queue pairs and compared with the oracle."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from bed import FAR, NEAR, packets
from ends import GUARD, TRANSPORT, Child

SIZE = 8 << 20


@pytest.mark.parametrize("page_bytes", [1024, 1152, 65536])
def test_pyverbs_reads_back_what_was_written(page_bytes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(page_bytes)
    sender, receiver = Child(NEAR, SIZE), Child(FAR, SIZE)
    try:
        sender.pool[:] = rng.integers(0, 255, SIZE, dtype=np.uint8)
        receiver.pool[:] = GUARD
        sent = packets()
        sender.call("connect", receiver.about)
        slots = SIZE // page_bytes
        src, dst = (rng.permutation(slots)[: slots // 2].astype(np.int32) for _ in range(2))
        assert [outcome for outcome, _ in sender.call("move", [(page_bytes, src, dst)], 20.0)] == ["ok"]
        if TRANSPORT == "rdma":
            assert packets()["rxe0"] > sent["rxe0"], "no RDMA packet left rxe0"
        want = np.full(SIZE, GUARD, np.uint8)
        paged = slots * page_bytes
        want[:paged].reshape(slots, page_bytes)[dst] = sender.pool[:paged].reshape(slots, page_bytes)[src]
        out = tmp_path / "read"
        command = [
            "/usr/bin/python3",
            str(Path(__file__).with_name("verbs_reader.py")),
            receiver.path,
            str(SIZE),
            str(out),
        ]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean)
        assert done.returncode == 0, done.stderr
        assert np.array_equal(np.fromfile(out, np.uint8), want)
    finally:
        sender.end()
        receiver.end()
