"""The judge of tests/gpu/sglang_pair.py, which needs no GPU: noise passes, another cache does not."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def replies() -> ModuleType:
    path = Path(__file__).parents[1] / "gpu" / "sglang_replies.py"
    spec = importlib.util.spec_from_file_location("sglang_replies", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def reply(replies: ModuleType, seed: int, noise: float = 0.0, tie_at: int | None = None, other: bool = False) -> object:
    """16 tokens; `noise` moves each logprob by at most that; at `tie_at` two tokens are equally likely, `other` takes
    the second of them and goes on differently."""
    model, moved = random.Random(seed), random.Random(99)
    tokens, logprobs, top = [], [], []
    for at in range(16):
        first, second = model.randrange(512), 512 + model.randrange(512)
        likely, less = -model.uniform(0.1, 1.0), -model.uniform(3.0, 5.0)
        if at == tie_at:
            less = likely
        if other and tie_at is not None and at >= tie_at:
            first, second = second, first
            likely, less = (less, likely) if at == tie_at else (likely - 1, less)
        likely, less = (x + moved.uniform(-noise, noise) for x in (likely, less))
        tokens.append(first)
        logprobs.append(likely)
        top.append({first: likely, second: less})
    return replies.Reply(tokens, logprobs, top)


def test_noise_within_the_tolerance_is_the_same_reply(replies: ModuleType) -> None:
    want, got = reply(replies, 1), reply(replies, 1, noise=0.05)
    assert 0 < replies.noise_of(want, got) <= 0.05
    assert replies.judge(want, got, 0.05) == replies.Verdict(None, 16)
    assert replies.judge(want, want, 0.0) == replies.Verdict(None, 16)


def test_noise_above_the_tolerance_is_told_with_its_position(replies: ModuleType) -> None:
    verdict = replies.judge(reply(replies, 1), reply(replies, 1, noise=0.05), 1e-6)
    assert verdict.wrong.endswith("at position 0") and verdict.compared == 0


def test_replies_may_part_where_two_tokens_are_equally_likely(replies: ModuleType) -> None:
    want, got = reply(replies, 1, tie_at=5), reply(replies, 1, noise=0.05, tie_at=5, other=True)
    assert replies.parting(want, got) == 5
    assert replies.judge(want, got, 0.1) == replies.Verdict(None, 5)


def test_replies_may_not_part_elsewhere(replies: ModuleType) -> None:
    want, got = reply(replies, 1), reply(replies, 1)
    got.tokens[7], got.top[7] = 511, {511: got.logprobs[7]}
    verdict = replies.judge(want, got, 0.1)
    assert verdict.compared == 7 and "inf apart" in verdict.wrong
    assert replies.noise_of(want, got) == float("inf")
    swapped = reply(replies, 1)
    (_, second) = swapped.top[7]
    swapped.tokens[7], swapped.logprobs[7] = second, swapped.top[7][second]
    assert "at position 7" in replies.judge(want, swapped, 0.1).wrong


def test_the_reply_of_another_cache_is_never_the_same(replies: ModuleType) -> None:
    want = reply(replies, 1)
    assert all(replies.judge(want, reply(replies, seed), 0.2).wrong for seed in range(2, 50))
