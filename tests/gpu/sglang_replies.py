"""When are two replies of a greedy model the same but for what batching changes? For tests/gpu/sglang_pair.py; pure.

A batch of another size takes other kernels, whose sums round otherwise, and where two tokens are about equally likely
the reply goes another way. Cache bytes that are wrong or missing change every logprob. So logprobs are compared as long
as the tokens are the same, and where they part, both tokens must have been about equally likely in both replies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Reply:
    """Tokens, the logprob of each (nats), and at each position the likeliest tokens with their logprobs."""

    tokens: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]


@dataclass(frozen=True)
class Verdict:
    """What is wrong, or None; and at how many positions the logprobs of the same token were compared."""

    wrong: str | None
    compared: int


def parting(a: Reply, b: Reply) -> int:
    """The first position whose tokens differ, or the length."""
    return next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))


def noise_of(want: Reply, got: Reply) -> float:
    """The greatest difference of logprobs (nats) up to where the replies part, and of the tokens that part them."""
    end = parting(want, got)
    differences = [abs(x - y) for x, y in zip(want.logprobs[:end], got.logprobs[:end], strict=True)]
    if end < len(want.tokens):
        differences.append(gap(want, got, end) / 2)  # of two logprobs, either may have moved
    return max(differences, default=0.0)


def gap(a: Reply, b: Reply, at: int) -> float:
    """By how much the replies preferred their own tokens at `at`, the greater; inf: the other is not listed."""
    return max(
        a.logprobs[at] - a.top[at].get(b.tokens[at], -math.inf), b.logprobs[at] - b.top[at].get(a.tokens[at], -math.inf)
    )


def judge(want: Reply, got: Reply, tolerance: float) -> Verdict:
    end = parting(want, got)
    for at in range(end):
        if not abs(want.logprobs[at] - got.logprobs[at]) <= tolerance:
            return Verdict(f"logprob {got.logprobs[at]:.4f} for {want.logprobs[at]:.4f} at position {at}", at)
    if end < len(want.tokens) and not gap(want, got, end) <= 2 * tolerance:
        return Verdict(
            f"token {got.tokens[end]} for {want.tokens[end]} at position {end}, {gap(want, got, end):.3f} apart", end
        )
    return Verdict(None, end)
