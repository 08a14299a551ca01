"""The two example programs work as their texts say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_send_reaches_receive() -> None:
    receiver = subprocess.Popen(
        [sys.executable, EXAMPLES / "receive.py"], stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    )
    try:
        assert receiver.stdout is not None
        address = receiver.stdout.readline().strip()
        sent = subprocess.run(
            [sys.executable, EXAMPLES / "send.py", address], capture_output=True, text=True, timeout=60
        )
        assert sent.returncode == 0, sent.stderr
        assert sent.stdout.startswith("moved over shm")
        assert receiver.stdout.readline() == "batch 1: pages [100, 3, 4] hold [7, 8, 9]\n"
    finally:
        receiver.kill()
        receiver.communicate(timeout=10)
