"""A prefill server on GPU 0 and a decode server on GPU 1 against one ordinary server: do they give the same tokens?

    python tests/gpu/sglang_pair.py OUT_DIR [--gpus 0:1] [--seconds 150] [--deterministic]

Run by hand where there are two GPUs, SGLang and pdxfer. Makes a seeded model with the KV geometry of Qwen2.5-7B (28
layers, 4 KV heads of 128, bf16), starts the servers, each seeing its own GPU alone, sends greedy requests of 1 to 4,000
tokens to either, one by one and eight at a time, compares (tests/gpu/sglang_replies.py), and writes
OUT_DIR/sglang.json and the servers' logs. `--gpus 0:0` puts all of it on one GPU. `--seconds` bounds the start alone.
Exit code 0: one by one the tokens are the same, and eight at a time nothing differs but what batches change on the one
server too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from sglang_replies import Reply, judge, noise_of

Send: TypeAlias = Callable[[ThreadPoolExecutor, list[int]], Reply]

VOCAB = 512
LENGTHS = (1, 5, 33, 257, 1000, 2000, 4000)
SAMPLING = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
PORTS = {"one": 7102, "prefill": 7100, "decode": 7101}
BOOTSTRAP = 8998
AT_ONCE, TOP = 8, 20  # requests at a time; likeliest tokens that are told of each position
NOISE_FACTOR, LEAST_TOLERANCE, MOST_NOISE = 3.0, 1e-3, 0.5  # of logprobs (nats)
FIRST_SECONDS = 200.0  # the first request of a server also compiles kernels, which /health does not wait for


def make_model(folder: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1234)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=28,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16384,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).eval().save_pretrained(folder, safe_serialization=True)
    path = folder / "config.json"
    text = json.loads(path.read_text())
    text |= {"torch_dtype": "bfloat16", "architectures": ["Qwen2ForCausalLM"]}
    text.setdefault("rope_theta", 10000.0)
    path.write_text(json.dumps(text))


def start(name: str, gpu: int, model: Path, out: Path, extra: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(PORTS[name]), "--attention-backend", "triton", "--sampling-backend", "pytorch"]
    command += ["--grammar-backend", "none", "--skip-tokenizer-init", "--disable-cuda-graph", "--skip-server-warmup"]
    command += ["--dtype", "bfloat16", "--max-total-tokens", "32768", "--mem-fraction-static", "0.25"]
    command += ["--max-running-requests", "16", "--disable-radix-cache", *extra]
    with (out / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "TOKENIZERS_PARALLELISM": "false"},
        )


def wait_ready(servers: dict[str, subprocess.Popen[bytes]], out: Path, deadline: float) -> None:
    waiting = set(servers)
    while waiting:
        for name in sorted(waiting):
            if servers[name].poll() is not None:
                tail = (out / f"{name}.log").read_text(errors="replace")[-3000:]
                raise SystemExit(f"{name} ended with code {servers[name].returncode}:\n{tail}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{PORTS[name]}/get_model_info", timeout=5) as answer:
                    if answer.status == 200:
                        waiting.discard(name)
            except OSError:
                pass  # not listening yet; the deadline below bounds the wait
        if time.monotonic() > deadline:
            name = sorted(waiting)[0]
            raise SystemExit(f"{name} was not ready:\n{(out / f'{name}.log').read_text(errors='replace')[-3000:]}")
        time.sleep(0.5)


def post(name: str, body: dict[str, object]) -> dict[str, Any]:
    with urllib.request.urlopen(request_of(name, body), timeout=FIRST_SECONDS) as answer:
        return dict(json.load(answer))


def request_of(name: str, body: dict[str, object]) -> urllib.request.Request:
    return urllib.request.Request(
        f"http://127.0.0.1:{PORTS[name]}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )


def room() -> dict[str, object]:
    """What joins a prefill and a decode request."""
    return {"bootstrap_host": "127.0.0.1", "bootstrap_port": BOOTSTRAP, "bootstrap_room": random.getrandbits(62)}


def reply_of_one(pool: ThreadPoolExecutor, prompt: list[int]) -> Reply:
    return reply_from(post("one", body_of(prompt)))


def reply_of_pair(pool: ThreadPoolExecutor, prompt: list[int]) -> Reply:
    body = body_of(prompt) | room()
    prefill, decode = pool.submit(post, "prefill", body), pool.submit(post, "decode", body)
    answer = decode.result()
    prefill.result()
    return reply_from(answer)


def body_of(prompt: list[int]) -> dict[str, object]:
    return {"input_ids": prompt, "sampling_params": SAMPLING, "return_logprob": True, "top_logprobs_num": TOP}


def reply_from(answer: dict[str, Any]) -> Reply:
    told = answer["meta_info"]
    own = [float(entry[0]) for entry in told["output_token_logprobs"]]
    top = [{int(entry[1]): float(entry[0]) for entry in entries} for entries in told["output_top_logprobs"]]
    tokens = [int(token) for token in answer["output_ids"]]
    if not len(tokens) == len(own) == len(top) == SAMPLING["max_new_tokens"]:
        raise SystemExit(f"{len(tokens)} tokens, {len(own)} logprobs, {len(top)} lists of the likeliest")
    return Reply(tokens, own, top)


def all_at_once(send: Send, pool: ThreadPoolExecutor, prompts: list[list[int]]) -> list[Reply]:
    with ThreadPoolExecutor(AT_ONCE) as many:
        return list(many.map(lambda prompt: send(pool, prompt), prompts))


def first_token_seconds(pool: ThreadPoolExecutor, name: str, prompt: list[int]) -> float:
    """From the request, to the one server or to both of the pair, until the first token came."""
    body = {"input_ids": prompt, "sampling_params": {**SAMPLING, "max_new_tokens": 2}, "stream": True}
    body |= room() if name == "decode" else {}
    begin = time.perf_counter()
    other = pool.submit(post, "prefill", body | {"stream": False}) if name == "decode" else None
    with urllib.request.urlopen(request_of(name, body), timeout=60) as answer:
        line = next((line for line in answer if line.startswith(b"data:")), None)
        seconds = time.perf_counter() - begin
        if line is None or b"output_ids" not in line:
            raise SystemExit(f"{name} streamed {line!r} in place of a token")
        answer.read()
    if other is not None:
        other.result()
    return seconds


def one_by_one(pool: ThreadPoolExecutor, prompts: list[list[int]]) -> tuple[list[Reply], list[dict[str, object]]]:
    """Every prompt alone, through the one server and through the pair: the same tokens?"""
    alone, rows = [], []
    for prompt in prompts:
        want = reply_of_one(pool, prompt)
        begin = time.perf_counter()
        got = reply_of_pair(pool, prompt)
        same = got.tokens == want.tokens
        alone.append(want)
        rows.append({"prompt": len(prompt), "same": same, "seconds": time.perf_counter() - begin})
        print(f"{len(prompt):6d} tokens: {'same' if same else f'DIFFERENT {want.tokens} {got.tokens}'}", flush=True)
    return alone, rows


def concurrent(pool: ThreadPoolExecutor, prompts: list[list[int]], alone: list[Reply]) -> dict[str, Any]:
    """The same load on the one server, which says what batches change, then on the pair; is the judge sharp enough?"""
    load, wanted = prompts * 2, alone * 2
    control = all_at_once(reply_of_one, pool, load)
    control += all_at_once(reply_of_one, pool, load)
    noise = max(noise_of(want, got) for want, got in zip(wanted * 2, control, strict=True))
    tolerance = NOISE_FACTOR * noise + LEAST_TOLERANCE
    pair = all_at_once(reply_of_pair, pool, load)
    verdicts = [judge(want, got, tolerance) for want, got in zip(wanted, pair, strict=True)]
    wrong = [f"{len(prompt)} tokens: {v.wrong}" for prompt, v in zip(load, verdicts, strict=True) if v.wrong]
    # A cache that is not the prompt's own: the same prompt with another second half, through the one server.
    draw = random.Random(8)
    halves = [p[: len(p) // 2] + [draw.randrange(3, VOCAB) for _ in p[len(p) // 2 :]] for p in prompts]
    seen = [judge(a, reply_of_one(pool, p), tolerance).wrong is not None for a, p in zip(alone, halves, strict=True)]
    compared = sum(v.compared for v in verdicts)
    result = {
        "requests": len(load),
        "at_a_time": AT_ONCE,
        "one_like_alone": sum(a.tokens == b.tokens for a, b in zip(control, wanted * 2, strict=True)),
        "one_requests": len(control),
        "pair_like_alone": sum(a.tokens == b.tokens for a, b in zip(pair, wanted, strict=True)),
        "logprob_noise_of_one": noise,
        "tolerance": tolerance,
        "positions_compared": compared,
        "positions": len(load) * SAMPLING["max_new_tokens"],  # type: ignore[operator]
        "wrong": wrong,
        "other_halves_told_apart": sum(seen),
        "other_halves": len(seen),
    }
    result["ok"] = not wrong and all(seen) and noise <= MOST_NOISE and compared * 2 >= result["positions"]
    return result


def compare(out: Path) -> dict[str, Any]:
    draw = random.Random(7)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(length)] for length in LENGTHS]
    with ThreadPoolExecutor(32) as pool:
        begin = time.perf_counter()
        first = pool.submit(reply_of_one, pool, prompts[2])
        reply_of_pair(pool, prompts[2])
        first.result()
        print(f"first requests took {time.perf_counter() - begin:.0f} s", flush=True)
        alone, rows = one_by_one(pool, prompts)
        at_once = concurrent(pool, prompts, alone)
        print(json.dumps(at_once), flush=True)
        first_token: dict[str, dict[str, float]] = {}
        for length in (128, 1000, 4000):
            prompt = (prompts[-1] * 2)[:length]
            taken: dict[str, list[float]] = {"one": [], "decode": []}
            for _ in range(15):
                for name, seconds in taken.items():
                    seconds.append(first_token_seconds(pool, name, prompt) * 1e3)
            first_token[str(length)] = {
                "one_p50_ms": statistics.median(taken["one"]),
                "pair_p50_ms": statistics.median(taken["decode"]),
            }
            print(f"{length:6d} tokens, first token after {json.dumps(first_token[str(length)])}", flush=True)
    log = (out / "prefill.log").read_text(errors="replace")
    path = [line[line.index("pdxfer:") :] for line in log.splitlines() if "connected to decode engine" in line]
    return {"rows": rows, "at_once": at_once, "first_token": first_token, "path": path}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--gpus", default="0:1", metavar="PREFILL:DECODE", help="the one server is on PREFILL")
    arguments.add_argument("--seconds", type=float, default=150.0, help="until the servers must be up")
    arguments.add_argument("--deterministic", action="store_true", help="SGLang's batch-invariant kernels")
    args = arguments.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prefill_gpu, decode_gpu = (int(gpu) for gpu in args.gpus.split(":"))
    deadline, model = time.monotonic() + args.seconds, args.out / "model"
    if not (model / "config.json").exists():
        make_model(model)
    extra = ["--enable-deterministic-inference"] if args.deterministic else []
    backend = [*extra, "--disaggregation-transfer-backend", "pdxfer"]
    servers = {
        "prefill": start(
            "prefill",
            prefill_gpu,
            model,
            args.out,
            ["--disaggregation-mode", "prefill", *backend, "--disaggregation-bootstrap-port", str(BOOTSTRAP)],
        ),
        "decode": start("decode", decode_gpu, model, args.out, ["--disaggregation-mode", "decode", *backend]),
        "one": start("one", prefill_gpu, model, args.out, extra),
    }
    try:
        begin = time.monotonic()
        wait_ready(servers, args.out, deadline)
        print(f"three servers were ready after {time.monotonic() - begin:.0f} s", flush=True)
        result = compare(args.out)
    finally:
        for server in servers.values():
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
    (args.out / "sglang.json").write_text(json.dumps(result, indent=1))
    print("\n".join(result["path"]))
    return 0 if all(row["same"] for row in result["rows"]) and result["at_once"]["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
