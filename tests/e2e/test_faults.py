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
from dataclasses import dataclass
from pathlib import Path

import client
import pytest
from conftest import NEWEST, Starter
from servers import Pair, Process, Usage

OPTIONS = ("--page-size", "16", "--disable-overlap-schedule", "--disable-radix-cache")
SLOW = {"PDXFER_FAULT": "throttle=100KB/s"}  # the long prompt's 600 KiB take six seconds
LONG = client.prompts(lengths=(300,), seed=21)[0]
BOUND_S = 5.0
CYCLES = int(os.environ.get("PDXE2E_CYCLES") or (20 if os.environ.get("PDXE2E_SUITE") == "full" else 2))


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
    assert after.fds <= before.fds + 8, f"{name}: descriptors {before.fds} -> {after.fds}"
    grown = after.rss_bytes - before.rss_bytes
    assert grown < (48 << 20) + cycles * (2 << 20), f"{name}: {grown >> 20} MiB more in {cycles} cycles"


@dataclass
class Slow:
    """A pair whose prefill server sends slowly, a second decode server, and the events of the first two."""

    pair: Pair
    second: Pair
    events: Path
    wanted: list[client.Tokens]

    def works(self, pair: Pair) -> bool:
        """Do short prompts still give the right tokens?"""
        return [client.send(pair, prompt).tokens() for prompt in client.prompts()[:4]] == self.wanted[:4]


@pytest.fixture(scope="module")
def slow(
    start_for_module: Starter,
    reference: Callable[..., list[client.Tokens]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Slow:
    wanted = reference("llama")
    events = tmp_path_factory.mktemp("faults") / "events"
    env = {"PDXE2E_EVENTS": str(events)}
    pair = start_for_module(NEWEST, "llama", *OPTIONS, prefill_env={**SLOW, **env}, decode_env=env)
    other = start_for_module.half(NEWEST, "decode", "llama", pair.bootstrap_port, *OPTIONS)
    return Slow(pair, Pair(pair.prefill, other.wait_ready(), pair.bootstrap_port), events, wanted)


def test_aborted_pages_are_reused_only_after_the_drain(slow: Slow) -> None:
    sent = under_way(slow.pair)
    for half in (slow.pair.decode, slow.pair.prefill):
        assert client.post(half.url + "/abort_request", {"rid": sent.rid}).status == 200
    assert sent.decode.result(30).failed_with("Aborted")
    assert client.send(slow.pair, client.prompts()[5]).tokens() == slow.wanted[5]
    time.sleep(1.0)
    log = [json.loads(line) for line in slow.events.read_text().splitlines()]
    at = {line["kind"]: line["t"] for line in log if line.get("room") == sent.room}
    assert {"move", "moved", "held", "ack", "released"} <= set(at), at
    assert at["moved"] <= at["ack"] <= at["released"], f"pages were released before the last write had stopped: {at}"
    assert at["released"] - at["held"] < BOUND_S, "the drain took its whole bound instead of cancelling the transfer"


def test_killed_decode_server(slow: Slow) -> None:
    pair, second = slow.pair, slow.second
    assert slow.works(pair) and slow.works(second)
    before = pair.prefill.usage()
    for cycle in range(CYCLES):
        sent = under_way(pair)
        spared = client.send(second, client.prompts()[6])
        killed = time.time()
        pair.decode.kill()
        answer = sent.prefill.result(30)
        assert answer.failed_with("PeerLostError"), answer
        assert answer.at - killed < BOUND_S, f"cycle {cycle}: the prefill server took {answer.at - killed:.1f} s"
        assert spared.tokens() == slow.wanted[6], f"cycle {cycle}: a request to the other decode server suffered"
        restart(pair.decode)
        assert slow.works(pair), f"cycle {cycle}: after the decode server came back"
        if cycle == 0:
            before = settled_usage(pair.prefill)
    assert_no_leak("prefill", before, settled_usage(pair.prefill), CYCLES - 1)


def test_killed_prefill_server(slow: Slow) -> None:
    pair = slow.pair
    slow.second.decode.stop()
    assert slow.works(pair)
    before = pair.decode.usage()
    for cycle in range(CYCLES):
        sent = under_way(pair)
        killed = time.time()
        pair.prefill.kill()
        answer = sent.decode.result(30)
        assert answer.failed_with("PeerLostError"), answer
        assert answer.at - killed < BOUND_S, f"cycle {cycle}: the decode server took {answer.at - killed:.1f} s"
        assert pair.decode.alive()
        restart(pair.prefill)
        assert slow.works(pair), f"cycle {cycle}: after the prefill server came back"
        if cycle == 0:
            before = settled_usage(pair.decode)
    assert_no_leak("decode", before, settled_usage(pair.decode), CYCLES - 1)
