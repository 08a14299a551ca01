"""The main job: tokens of a prefill/decode pair over pdxfer equal those of one colocated server.

A pair takes half a minute to start, so each test covers several options at once; what a pair must show beyond equal
tokens (chunks, prefix hits, both head directions) is asserted, so that no option passes by not being used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import client
import pytest
from conftest import NEWEST, OLDEST, Starter

CHUNKED = ("--chunked-prefill-size", "64")
NO_OVERLAP = ("--disable-overlap-schedule",)
MLA = {"PDXE2E_MLA": "1"}
TCP = {"PDXFER_TRANSPORTS": "tcp"}
CHECKSUM = {"PDXE2E_CHECKSUM": "1"}
# SGLang 0.5.23 sends cached prefixes early with a CUDA event when overlap is on, which a CPU does not have.
NO_EARLY_SEND = {"SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0"}


def moved(events: Path) -> list[int]:
    """Bytes of each batch that the prefill side moved."""
    import json

    lines = [json.loads(line) for line in events.read_text().splitlines()]
    return [line["bytes"] for line in lines if line["kind"] == "move"]


@pytest.mark.quick
def test_page_1_chunked_overlap_prefix_cache_checksum(
    start_pair: Starter, reference: Callable[..., list[client.Tokens]], tmp_path: Path
) -> None:
    events, control = tmp_path / "events", tmp_path / "control"
    env = {**CHECKSUM, "PDXE2E_EVENTS": str(events), "PDXE2E_CONTROL": str(control)}
    wanted = reference("llama")
    pair = start_pair(
        NEWEST,
        "llama",
        "--page-size",
        "1",
        *CHUNKED,
        "--disaggregation-enable-kv-checksum",
        decode=("--disaggregation-decode-enable-radix-cache",),
        prefill_env={**env, **NO_EARLY_SEND},
        decode_env=env,
        serve=True,
    )
    prompts = client.prompts()
    assert client.through_pair(pair, prompts) == wanted
    first = moved(events)
    assert len(first) > 2 * len(prompts), "long prompts were not sent in chunks"
    # Everything is in the decode side's prefix cache now: the last chunk has no page, only the metadata row.
    assert client.through_pair(pair, prompts) == wanted
    again = moved(events)[len(first) :]
    assert sum(again) < 0.2 * sum(first), f"prefix hits still moved {sum(again)} of {sum(first)} bytes"
    assert "KV checksum mismatch" not in pair.decode.text()

    # Negative controls, on fresh prompts that no cache holds.
    fresh = client.prompts(lengths=(70, 200), seed=11)
    control.write_text("flip")
    answers = [client.send(pair, prompt).decode.result(120) for prompt in fresh]
    assert all(answer.failed_with("KV checksum mismatch") for answer in answers), [a.body for a in answers]
    control.write_text("")
    good = [client.send(pair, prompt).tokens() for prompt in client.prompts(lengths=(70, 200), seed=12)]
    assert all(good)


@pytest.mark.quick
def test_page_16_chunked_and_a_pair_that_moves_nothing(
    start_pair: Starter, reference: Callable[..., list[client.Tokens]], tmp_path: Path
) -> None:
    control = tmp_path / "control"
    wanted = reference("llama")
    pair = start_pair(
        NEWEST, "llama", "--page-size", "16", *CHUNKED, *NO_OVERLAP, prefill_env={"PDXE2E_CONTROL": str(control)}
    )
    prompts = client.prompts()
    assert client.through_pair(pair, prompts) == wanted
    control.write_text("drop")
    assert client.through_pair(pair, prompts) != wanted, "the comparison cannot fail: no page was moved"
    control.write_text("flip")
    assert client.through_pair(pair, prompts[-1:]) != [wanted[len(prompts) - 1]] * 2, "a damaged byte went unnoticed"
    control.write_text("")
    assert client.through_pair(pair, prompts) == wanted


def test_page_64_tp1_to_tp2_qwen3(start_pair: Starter, reference: Callable[..., list[client.Tokens]]) -> None:
    pair = start_pair(NEWEST, "qwen3", "--page-size", "64", *NO_OVERLAP, tp=(1, 2))
    assert client.through_pair(pair, client.prompts()) == reference("qwen3")


def test_page_16_tp2_to_tp1_qwen2_over_tcp(start_pair: Starter, reference: Callable[..., list[client.Tokens]]) -> None:
    options = ("--page-size", "16", *CHUNKED, *NO_OVERLAP)
    pair = start_pair(NEWEST, "qwen2", *options, prefill_env=TCP, decode_env=TCP, tp=(2, 1))
    assert client.through_pair(pair, client.prompts()) == reference("qwen2")
    assert pair.prefill.text().count("over tcp") == 2, "both ranks should have used tcp"


def test_mla_with_checksum(start_pair: Starter, reference: Callable[..., list[client.Tokens]]) -> None:
    env = {**MLA, **CHECKSUM}
    pair = start_pair(
        NEWEST,
        "mla",
        "--page-size",
        "16",
        *CHUNKED,
        *NO_OVERLAP,
        "--disaggregation-enable-kv-checksum",
        prefill_env=env,
        decode_env=env,
    )
    assert client.through_pair(pair, client.prompts()) == reference("mla", MLA)
    assert "KV checksum mismatch" not in pair.decode.text()


def test_oldest_sglang_page_16_chunked_tp1_to_tp2(
    start_pair: Starter, reference: Callable[..., list[client.Tokens]]
) -> None:
    pair = start_pair(OLDEST, "llama", "--page-size", "16", *CHUNKED, *NO_OVERLAP, tp=(1, 2))
    assert client.through_pair(pair, client.prompts()) == reference("llama")


@pytest.mark.full
@pytest.mark.parametrize("page_size", ["1", "16", "64"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mla"])
@pytest.mark.parametrize("tp", [(1, 1), (1, 2), (2, 1)])
def test_every_combination(
    start_pair: Starter,
    reference: Callable[..., list[client.Tokens]],
    arch: str,
    page_size: str,
    tp: tuple[int, int],
) -> None:
    env = MLA if arch == "mla" else {}
    options = ("--page-size", page_size, *CHUNKED)
    pair = start_pair(NEWEST, arch, *options, prefill_env={**env, **NO_EARLY_SEND}, decode_env=env, tp=tp)
    assert client.through_pair(pair, client.prompts()) == reference(arch, env)


@pytest.mark.full
@pytest.mark.parametrize("tp", [(1, 1), (2, 1)])
@pytest.mark.parametrize("page_size", ["1", "64"])
def test_oldest_sglang(
    start_pair: Starter,
    reference: Callable[..., list[client.Tokens]],
    page_size: str,
    tp: tuple[int, int],
) -> None:
    pair = start_pair(OLDEST, "llama", "--page-size", page_size, *CHUNKED, *NO_OVERLAP, tp=tp)
    assert client.through_pair(pair, client.prompts()) == reference("llama")
