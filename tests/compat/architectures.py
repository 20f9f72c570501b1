"""Decoder-only architectures of transformers, small enough that all their stages take a second or two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.support.small_models import save_model

LINEAR, SLIDING, FULL = "linear_attention", "sliding_attention", "full_attention"
SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
_HEAD: Mapping[str, Any] = {"head_dim": 16}
_EXPERTS: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS: Mapping[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOW: Mapping[str, Any] = {"sliding_window": 8, "layer_types": [SLIDING, FULL]}
_GPT: Mapping[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_MAMBA: Mapping[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
_MAMBA2: Mapping[str, Any] = {
    **_MAMBA,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "apertus": {},
    "arcee": _HEAD,
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "codegen": {**_GPT, "num_attention_heads": 4, "rotary_dim": 4},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**_HEAD, **_WINDOW, "logit_scale": 0.5},
    "dbrx": {
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "diffllama": {"num_key_value_heads": 2},
    "doge": {},
    "ernie4_5": _HEAD,
    "exaone4": {**_WINDOW, "sliding_window_pattern": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 1},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "head_dim": 16},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "gemma": _HEAD,
    "gemma2": {**_HEAD, **_WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_HEAD, **_WINDOW, "query_pre_attn_scalar": 16},
    "glm": _HEAD,
    "glm4": _HEAD,
    "glm4_moe": {**_HEAD, **{key: _LATENT[key] for key in list(_LATENT)[6:]}},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {"num_key_value_heads": 2},
    "gpt_oss": {**_HEAD, **_WINDOW, **_LOCAL_EXPERTS},
    "gptj": {**_GPT, "rotary_dim": 8},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "granitemoe": _LOCAL_EXPERTS,
    "granitemoehybrid": {
        **_MAMBA2,
        **_LOCAL_EXPERTS,
        "layer_types": [LINEAR, FULL],
        "shared_intermediate_size": 16,
    },
    "helium": _HEAD,
    "jamba": {
        **_MAMBA,
        "mamba_dt_rank": 4,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", FULL], "block_multiple_of": 16},
    "llama": {},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "minimax": {**_HEAD, **_LOCAL_EXPERTS, "layer_types": [LINEAR, FULL], "block_size": 8},
    "ministral": {**_HEAD, **_WINDOW},
    "mistral": {**_HEAD, "sliding_window": 8},
    "mixtral": _LOCAL_EXPERTS,
    "modernbert-decoder": {
        "local_attention": 8,
        "layer_types": [FULL, SLIDING],
        "num_key_value_heads": 2,
        "bos_token_id": 0,
    },
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128},
    "nanochat": {"num_key_value_heads": 2},
    "nemotron": _HEAD,
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": _WINDOW,
    "olmoe": {**_EXPERTS, "num_key_value_heads": 2},
    "openai-gpt": _GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {**_LOCAL_EXPERTS, "router_jitter_noise": 0.0},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": _HEAD,
    "qwen3_moe": {**_HEAD, **_EXPERTS},
    "qwen3_next": {
        **_HEAD,
        **_EXPERTS,
        "shared_expert_intermediate_size": 16,
        "layer_types": [LINEAR, FULL],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "lru_width": 32,
        "attention_window_size": 8,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "seed_oss": _HEAD,
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {**_HEAD, **_WINDOW, "query_pre_attn_scalar": 16},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 2},
}
"""Settings by transformers' name of the architecture, beside SIZES."""
REPRESENTATIVES = ("llama", "gemma2", "gpt2", "qwen2_moe", "mamba")
"""Architectures of each kind: plain, with capped logits and windows, with Conv1D and tied ends, of experts, recurrent."""


def make_architecture(name: str, directory: Path, tokenizer: Any) -> Path:
    """Directory with a model of random float32 weights, none of them zero or one as norms and biases begin, and no dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ends = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(
        name, **{**SIZES, **ends, "vocab_size": len(tokenizer), "dtype": "float32", **ARCHITECTURES[name]}
    )
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("pdrop" in key or "dropout" in key or "layerdrop" in key):
            setattr(config, key, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape) * 0.05)
    save_model(model, tokenizer, directory)
    return directory
