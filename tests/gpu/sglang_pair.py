"""A prefill server on GPU 0 and a decode server on GPU 1 against one ordinary server: do they give the same tokens?

    python tests/gpu/sglang_pair.py OUT_DIR [--seconds 240]

Run by hand where there are two GPUs, SGLang and pdxfer. Makes a seeded model with the KV geometry of Qwen2.5-7B (28
layers, 4 KV heads of 128, bf16), starts the servers, each seeing its own GPU alone, sends greedy requests of 1 to 4,000
tokens to either, compares, and writes OUT_DIR/sglang.json and the servers' logs. Exit code 0: same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VOCAB = 512
LENGTHS = (1, 5, 33, 257, 1000, 2000, 4000)
SAMPLING = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
PORTS = {"one": 7102, "prefill": 7100, "decode": 7101}
BOOTSTRAP = 8998
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
    command += ["--dtype", "bfloat16", "--max-total-tokens", "32768", "--mem-fraction-static", "0.3"]
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


def post(name: str, body: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORTS[name]}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=FIRST_SECONDS) as answer:
        return dict(json.load(answer))


def tokens_of_one(prompt: list[int]) -> list[int]:
    return list(post("one", {"input_ids": prompt, "sampling_params": SAMPLING})["output_ids"])  # type: ignore[call-overload]


def tokens_of_pair(pool: ThreadPoolExecutor, prompt: list[int]) -> list[int]:
    body = {
        "input_ids": prompt,
        "sampling_params": SAMPLING,
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": BOOTSTRAP,
        "bootstrap_room": random.getrandbits(62),
    }
    prefill, decode = pool.submit(post, "prefill", body), pool.submit(post, "decode", body)
    answer = decode.result()
    prefill.result()
    return list(answer["output_ids"])  # type: ignore[call-overload]


def compare(out: Path) -> dict[str, object]:
    draw = random.Random(7)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(length)] for length in LENGTHS]
    rows = []
    with ThreadPoolExecutor(32) as pool:
        begin = time.perf_counter()
        first = pool.submit(tokens_of_one, prompts[2])
        tokens_of_pair(pool, prompts[2])
        first.result()
        print(f"first requests took {time.perf_counter() - begin:.0f} s", flush=True)
        for prompt in prompts:
            want = tokens_of_one(prompt)
            begin = time.perf_counter()
            got = tokens_of_pair(pool, prompt)
            rows.append({"prompt": len(prompt), "same": got == want, "seconds": time.perf_counter() - begin})
            print(f"{len(prompt):6d} tokens: {'same' if got == want else f'DIFFERENT {want} {got}'}", flush=True)
        with ThreadPoolExecutor(8) as many:
            at_once = list(many.map(lambda p: tokens_of_pair(pool, p), prompts * 2))
        again = [tokens_of_pair(pool, prompt) for prompt in prompts]
    alike = sum(a == b for a, b in zip(at_once, again * 2, strict=True))
    log = (out / "prefill.log").read_text(errors="replace")
    path = [line[line.index("pdxfer:") :] for line in log.splitlines() if "connected to decode engine" in line]
    print(f"{alike} of {len(at_once)} requests sent at once gave the tokens of the same request alone (batches differ)")
    return {"rows": rows, "at_once": len(at_once), "at_once_like_alone": alike, "path": path}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--seconds", type=float, default=240.0)
    args = arguments.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    deadline, model = time.monotonic() + args.seconds, args.out / "model"
    if not (model / "config.json").exists():
        make_model(model)
    backend = ["--disaggregation-transfer-backend", "pdxfer"]
    servers = {
        "prefill": start(
            "prefill",
            0,
            model,
            args.out,
            ["--disaggregation-mode", "prefill", *backend, "--disaggregation-bootstrap-port", str(BOOTSTRAP)],
        ),
        "decode": start("decode", 1, model, args.out, ["--disaggregation-mode", "decode", *backend]),
        "one": start("one", 0, model, args.out, []),
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
    print("\n".join(str(line) for line in result["path"]))  # type: ignore[union-attr]
    return 0 if all(row["same"] for row in result["rows"]) else 1  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())
