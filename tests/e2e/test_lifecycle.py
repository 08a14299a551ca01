"""A live pair whose memory is released and resumed, and whose servers change roles: the manager is torn down and built
again in the same process, registrations come and go, and the tokens stay those of a colocated server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import client
from conftest import NEWEST, Starter
from servers import Pair, Process, free_ports

# No prefix cache: one that a server built while prefilling is no decode server's, and SGLang's own check of its pool
# (prompts seen twice are counted as leaked) then ends the server.
BOTH_ROLES = (
    "--page-size", "16", "--disable-overlap-schedule", "--enable-pd-role-switch", "--disable-radix-cache",
    "--disaggregation-decode-retraction-backup", "cpu_tensor",
)  # fmt: skip


def ask(server: Process, path: str, **body: Any) -> Any:
    answer = client.post(server.url + path, body)
    assert answer.status == 200, f"{server.name}: {path}: HTTP {answer.status}: {answer.body}\n{server.tail()}"
    return answer.body


def test_memory_release_and_role_switch(start_pair: Starter, reference: Callable[..., list[client.Tokens]]) -> None:
    wanted, prompts = reference("llama"), client.prompts()
    ports = free_ports(2)
    env = {"SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0"}
    first = start_pair.half(NEWEST, "prefill", "llama", ports[0], *BOTH_ROLES, environment=env)
    second = start_pair.half(
        NEWEST, "decode", "llama", ports[0], *BOTH_ROLES, "--disaggregation-bootstrap-port", str(ports[1]),
        environment=env,
    )  # fmt: skip
    pair = Pair(first.wait_ready(), second.wait_ready(), ports[0])
    assert client.through_pair(pair, prompts) == wanted

    for _ in range(2):
        for server in (pair.prefill, pair.decode):
            ask(server, "/release_memory_occupation", tags=["kv_cache"])
        for server in (pair.prefill, pair.decode):
            ask(server, "/resume_memory_occupation", tags=["kv_cache"])
        assert client.through_pair(pair, prompts) == wanted

    for port in (ports[1], ports[0]):  # there and back
        ask(pair.prefill, "/pd_role_switch", new_role="decode", decode_cuda_graph_memory_gb=0.0)
        ask(pair.decode, "/pd_role_switch", new_role="prefill")
        pair = Pair(pair.decode, pair.prefill, port)
        assert client.through_pair(pair, prompts) == wanted
