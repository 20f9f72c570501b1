"""Language models of several architectures, small enough to build in a test: random weights, no tokenizer."""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 99
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tiny_config(kind: str, **further: Any) -> Any:
    """Returns the configuration of a tiny model of transformers' type `kind`; `further` replaces settings."""
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **{**_SIZES, **_OWN_SIZES.get(kind, {}), **further})


def tiny_model(kind: str, *, seed: int = 0, **further: Any) -> Any:
    """Returns a tiny model of transformers' type `kind` with random float32 weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(kind, **further)).eval()


_ROUTED: dict[str, int] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mamba": {"state_size": 4, "num_heads": 2},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "mixtral": {"num_local_experts": 4},
    "glm4_moe": _ROUTED,
    "deepseek_v3": {
        **_ROUTED,
        **{"q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8},
    },
}
