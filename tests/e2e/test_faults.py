"""Servers that die and clients that give up while KV cache is moving, on a transport made slow.

A dead peer must end its requests at the survivor within 5 s with an error that names the loss, leave other requests
alone, and be usable again once restarted; cycle after cycle without a leak. An aborted request's pages must not be
reused before the last write into them has stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import client
from conftest import NEWEST
from servers import Pair, Process, Usage

OPTIONS = ("--page-size", "16", "--disable-overlap-schedule", "--disable-radix-cache")
SLOW = {"PDXFER_FAULT": "throttle=100KB/s"}  # the long prompt's 600 KiB take six seconds
LONG = client.prompts(lengths=(300,), seed=21)[0]
BOUND_S = 5.0
CYCLES = 20 if os.environ.get("PDXE2E_SUITE") == "full" else 2


def under_way(pair: Pair, prompt: client.Tokens = LONG) -> client.Sent:
    """A request whose pages are moving: sent, prefilled, not answered."""
    sent = client.send(pair, prompt)
    time.sleep(1.5)
    assert not sent.decode.done() and not sent.prefill.done(), "the transport is not slow enough for this test"
    return sent


def restart(process: Process) -> None:
    process.start().wait_ready()


def settled_usage(process: Process) -> Usage:
    time.sleep(3.0)
    return process.usage()


def assert_no_leak(name: str, before: Usage, after: Usage, cycles: int) -> None:
    assert after.threads <= before.threads + 2, f"{name}: threads {before.threads} -> {after.threads}"
    assert after.fds <= before.fds + 8 + cycles, f"{name}: descriptors {before.fds} -> {after.fds}"
    grown = after.rss_bytes - before.rss_bytes
    assert grown < (48 << 20) + cycles * (2 << 20), f"{name}: {grown >> 20} MiB more in {cycles} cycles"


def test_killed_peers(start_pair: Callable[..., Pair], reference: Callable[..., list[client.Tokens]]) -> None:
    prompts, wanted = client.prompts(), reference("llama")
    pair = start_pair(NEWEST, "llama", *OPTIONS, prefill_env=SLOW)
    short, short_wanted = prompts[:4], wanted[:4]

    def works() -> bool:
        return [client.send(pair, prompt).tokens() for prompt in short] == short_wanted

    assert works()
    before: dict[str, Usage] = {}
    for cycle in range(CYCLES):
        sent = under_way(pair)
        killed = time.time()
        pair.decode.kill()
        answer = sent.prefill.result(30)
        assert answer.failed_with("PeerLostError"), answer
        assert answer.at - killed < BOUND_S, f"cycle {cycle}: the prefill server took {answer.at - killed:.1f} s"
        assert pair.prefill.alive()
        restart(pair.decode)
        assert works(), f"cycle {cycle}: after the decode server came back"
        if cycle == 0:
            before["prefill"] = settled_usage(pair.prefill)
    assert_no_leak("prefill", before["prefill"], settled_usage(pair.prefill), CYCLES - 1)

    for cycle in range(CYCLES):
        sent = under_way(pair)
        killed = time.time()
        pair.prefill.kill()
        answer = sent.decode.result(30)
        assert answer.failed_with("PeerLostError"), answer
        assert answer.at - killed < BOUND_S, f"cycle {cycle}: the decode server took {answer.at - killed:.1f} s"
        assert pair.decode.alive()
        restart(pair.prefill)
        assert works(), f"cycle {cycle}: after the prefill server came back"
        if cycle == 0:
            before["decode"] = settled_usage(pair.decode)
    assert_no_leak("decode", before["decode"], settled_usage(pair.decode), CYCLES - 1)


def test_a_dead_decode_server_leaves_the_other_alone(
    start_pair: Callable[..., Pair],
    sglang: Callable[..., object],
    model: Callable[[str], Path],
    reference: Callable[..., list[client.Tokens]],
) -> None:
    from servers import role

    wanted = reference("llama")
    pair = start_pair(NEWEST, "llama", *OPTIONS, prefill_env=SLOW)
    installed = sglang(NEWEST)
    other = installed.server("decode-2", model("llama"), *role(installed, "decode", 0), *OPTIONS)  # type: ignore[attr-defined]
    try:
        second = Pair(pair.prefill, other.start().wait_ready(), pair.bootstrap_port)
        doomed, spared = under_way(pair), client.send(second, client.prompts()[6])
        pair.decode.kill()
        assert spared.tokens() == wanted[6]
        assert doomed.prefill.result(30).failed_with("PeerLostError")
        assert client.send(second, client.prompts()[5]).tokens() == wanted[5]
    finally:
        other.stop()


def test_aborted_pages_are_reused_only_after_the_drain(
    start_pair: Callable[..., Pair], reference: Callable[..., list[client.Tokens]], tmp_path: Path
) -> None:
    wanted = reference("llama")
    events = tmp_path / "events"
    env = {"PDXE2E_EVENTS": str(events)}
    pair = start_pair(NEWEST, "llama", *OPTIONS, prefill_env={**SLOW, **env}, decode_env=env)
    sent = under_way(pair)
    for half in (pair.decode, pair.prefill):
        assert client.post(half.url + "/abort_request", {"rid": sent.rid}).status == 200
    assert sent.decode.result(30).failed_with("abort")
    assert client.send(pair, client.prompts()[5]).tokens() == wanted[5]
    time.sleep(1.0)
    log = [json.loads(line) for line in events.read_text().splitlines()]
    at = {line["kind"]: line["t"] for line in log if line.get("room") == sent.room}
    assert {"move", "moved", "held", "ack", "released"} <= set(at), at
    assert at["moved"] <= at["ack"] <= at["released"], f"pages were released before the last write had stopped: {at}"
    assert at["released"] - at["held"] < BOUND_S, "the drain took its whole bound instead of cancelling the transfer"
