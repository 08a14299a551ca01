"""SGLang's prefill and decode servers over RDMA, on the CPU of the test bed; not a pytest test. By tests/rdma/sglang.

    PYTHON tests/rdma/sglang_pair.py reference FOLDER             outside: a tiny model, and the tokens of one server
    tests/rdma/run PYTHON tests/rdma/sglang_pair.py pair FOLDER   inside: the same tokens from a pair over rxe0 and rxe1

PYTHON: one with SGLang, pdxfer and the test-only plugin, as tests/e2e/install makes it. FOLDER: in
$RDMA_BED_SCRATCH.
The servers, prompts and model are those of tests/e2e. START_S: six processes import SGLang on the bed's one CPU.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))
import client
from bed import packets, record, require
from models import write_model
from servers import Pair, Process, Sglang, free_ports, role

VERSION = "0.5.23"
START_S = 1200.0
REQUEST_S = 240.0
PROMPTS = client.prompts((5, 33, 100, 257))
OPTIONS = ("--page-size", "16", "--chunked-prefill-size", "64", "--disable-overlap-schedule")


def make_reference(folder: Path) -> None:
    model = write_model(folder / "model", "llama")
    server = Sglang(VERSION, sys.executable, folder).server("colocated", model, "--disable-overlap-schedule")
    try:
        tokens = client.through_url(server.start().wait_ready(START_S).url, PROMPTS)
    finally:
        server.stop()
    (folder / "tokens.json").write_text(json.dumps(tokens))


def start_pair(folder: Path) -> Pair:
    sglang = Sglang(VERSION, sys.executable, folder)
    (bootstrap,) = free_ports(1)
    halves: list[Process] = []
    try:
        for mode, device in (("prefill", "rxe0"), ("decode", "rxe1")):
            arguments = [*role(sglang, mode, bootstrap), *OPTIONS, "--disaggregation-ib-device", device]
            # Nothing else can stand in for rdma; the bed has no default route by which SGLang would find its address.
            environment = {"PDXFER_TRANSPORTS": "rdma", "SGLANG_HOST_IP": "127.0.0.1"}
            server = sglang.server(mode, folder / "model", *arguments, environment=environment)
            halves.append(server.start())
        return Pair(halves[0].wait_ready(START_S), halves[1].wait_ready(START_S), bootstrap)
    except BaseException:
        for server in halves:
            server.kill()
        raise


def ask(pair: Pair) -> list[client.Tokens]:
    """One by one, then all at once."""
    one_by_one = [client.send(pair, prompt, REQUEST_S).tokens(REQUEST_S) for prompt in PROMPTS]
    at_once = [sent.tokens(REQUEST_S) for sent in [client.send(pair, prompt, REQUEST_S) for prompt in PROMPTS]]
    return one_by_one + at_once


def run_pair(folder: Path) -> None:
    wanted = json.loads((folder / "tokens.json").read_text())
    begin = time.monotonic()
    pair = start_pair(folder)
    ready = time.monotonic()
    before = packets()
    try:
        assert ask(pair) == wanted, "the pair's tokens are not those of one server"
        sent = {device: count - before[device] for device, count in packets().items()}
        assert sent["rxe0"] > 100, f"the cache did not cross from rxe0: {sent}"
        assert re.search("over rdma", pair.prefill.text()), pair.prefill.tail()
    except BaseException:
        print(pair.prefill.tail(), pair.decode.tail(), sep="\n----\n")
        raise
    finally:
        pair.prefill.kill()
        pair.decode.kill()
    facts = {
        "sglang": VERSION,
        "requests": len(wanted),
        "packets": sent,
        "start_s": round(ready - begin),
        "requests_s": round(time.monotonic() - ready),
    }
    record("SGLang's pair", facts)
    print(f"SGLang's pair over RDMA: the tokens of one server; {facts}")


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if command == "reference":
        make_reference(folder)
    else:
        require()
        run_pair(folder)


if __name__ == "__main__":
    main()
