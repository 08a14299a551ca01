"""Requests to a pair or a single server, and the fixed prompts whose tokens are compared."""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from models import VOCAB
from servers import Pair

Tokens = list[int]
SAMPLING = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
_rooms = random.Random()
_pool = ThreadPoolExecutor(64)


def prompts(lengths: tuple[int, ...] = (1, 5, 16, 33, 64, 100, 257, 300), seed: int = 7) -> list[Tokens]:
    """Fixed prompts: around page and chunk borders, and well beyond them."""
    source = random.Random(seed)
    return [[source.randrange(3, VOCAB) for _ in range(n)] for n in lengths]


@dataclass
class Answer:
    """What a server said: the HTTP status, the JSON (or text) it sent, and seconds since the epoch when it did."""

    status: int
    body: Any
    at: float

    @property
    def tokens(self) -> Tokens:
        assert self.status == 200, f"HTTP {self.status}: {self.body}"
        ids = self.body["output_ids"]
        assert len(ids) == SAMPLING["max_new_tokens"], f"cut short: {self.body}"
        return list(ids)

    def failed_with(self, text: str) -> bool:
        return (self.status != 200 or "abort" in json.dumps(self.body)) and text in json.dumps(self.body)


def post(url: str, body: dict[str, Any], timeout: float = 120.0) -> Answer:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    except OSError as error:
        return Answer(0, str(error), time.time())
    try:
        return Answer(status, json.loads(text), time.time())
    except ValueError:
        return Answer(status, text.decode(errors="replace"), time.time())


@dataclass
class Sent:
    """A request that is under way at both servers of a pair."""

    room: int
    rid: str
    prefill: Future[Answer]
    decode: Future[Answer]

    def tokens(self, timeout: float = 120.0) -> Tokens:
        return self.decode.result(timeout).tokens


def send(pair: Pair, prompt: Tokens, timeout: float = 120.0) -> Sent:
    """What a router does: the same request to both servers, with one room."""
    room = _rooms.getrandbits(62)
    body = {
        "input_ids": prompt,
        "sampling_params": SAMPLING,
        "rid": f"e2e-{room}",
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": pair.bootstrap_port,
        "bootstrap_room": room,
    }
    first = _pool.submit(post, pair.prefill.url + "/generate", body, timeout)
    second = _pool.submit(post, pair.decode.url + "/generate", body, timeout)
    return Sent(room, body["rid"], first, second)


def through_pair(pair: Pair, wanted: list[Tokens]) -> list[Tokens]:
    """Tokens of every prompt, one by one and then all at once."""
    one_by_one = [send(pair, prompt).tokens() for prompt in wanted]
    at_once = [sent.tokens() for sent in [send(pair, prompt) for prompt in wanted]]
    return one_by_one + at_once


def through_url(url: str, wanted: list[Tokens]) -> list[Tokens]:
    """The same through one address: a colocated server or a router."""

    def ask(prompt: Tokens) -> Tokens:
        return post(url + "/generate", {"input_ids": prompt, "sampling_params": SAMPLING}).tokens

    one_by_one = [ask(prompt) for prompt in wanted]
    return one_by_one + list(_pool.map(ask, wanted))
