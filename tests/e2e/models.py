"""Tiny models with real (seeded) random weights, so that two servers given one directory compute the same tokens.

The weights' spread is large on purpose: greedy output then depends on the whole context, and a wrong KV byte shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 512
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.25,
}


def _build(arch: str) -> Any:
    import transformers as hf

    if arch == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES))
    if arch == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SIZES))
    if arch == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=32, **_SIZES))
    if arch == "mla":  # DeepSeek-V2 attention, dense layers only
        sizes = {**_SIZES, "num_key_value_heads": _SIZES["num_attention_heads"]}
        return hf.DeepseekV2ForCausalLM(
            hf.DeepseekV2Config(
                kv_lora_rank=64,
                q_lora_rank=None,
                qk_rope_head_dim=32,
                qk_nope_head_dim=32,
                v_head_dim=32,
                n_routed_experts=2,
                n_shared_experts=1,
                num_experts_per_tok=1,
                first_k_dense_replace=sizes["num_hidden_layers"],
                **sizes,
            )
        )
    raise ValueError(f"unknown architecture {arch!r}: llama, qwen2, qwen3 or mla")


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"<t{i}>": i for i in range(VOCAB)}, unk_token="<t3>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<t0>", eos_token="<t1>", pad_token="<t2>", unk_token="<t3>"
    ).save_pretrained(folder)


def write_model(folder: Path, arch: str, seed: int = 1234) -> Path:
    """Write config, weights and a word-per-id tokenizer; returns `folder`."""
    import torch

    torch.manual_seed(seed)
    model = _build(arch).to(torch.float32).eval()
    model.save_pretrained(folder, safe_serialization=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # Spelled out, so that the transformers of every supported SGLang reads the same model.
    config["architectures"] = [type(model).__name__]
    config["torch_dtype"] = "float32"
    config.setdefault("rope_theta", 10000.0)
    if arch == "mla":  # SGLang's CPU path has the YaRN rotary embedding only; factor 1 is the plain one
        config["moe_layer_freq"] = 1
        config["rope_scaling"] = {
            "type": "yarn",
            "rope_type": "deepseek_yarn",
            "factor": 1.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    path.write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder)
    return folder
