"""Rollouts of models with other memories than a KV cache: their log-probabilities are those of whole passes in float32."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from stillhouse.student_trainer.config.schema import RolloutConfig, StudentConfig
from stillhouse.student_trainer.train.rollouts.generation_mode import GenerationMode
from stillhouse.student_trainer.train.rollouts.local_sampler import LocalSampler
from stillhouse.student_trainer.train.student.student import Student

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48}
FAMILIES: dict[str, tuple[GenerationMode, dict[str, Any]]] = {
    "Qwen2": (GenerationMode(True, "continuous"), HEADS),
    "Gemma2": (GenerationMode(True, "padded"), {**HEADS, "head_dim": 16, "sliding_window": 8}),
    "Mamba": (GenerationMode(True, "padded"), {**SIZES, "state_size": 8}),
    "Rwkv": (GenerationMode(True, "single"), {**SIZES, "attention_hidden_size": 32}),
    "RecurrentGemma": (
        GenerationMode(True, "equal"),
        {**HEADS, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    ),
}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_are_drawn_from_what_whole_passes_say(family: str, fresh: bool) -> None:
    mode, settings = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if not fresh:
        for weight in model.parameters():
            weight.data += torch.randn_like(weight) * 0.1
    tokenizer = SimpleNamespace(eos_token_id=None)
    model.generation_config.eos_token_id = None
    sampler = LocalSampler(
        Student(model, tokenizer, StudentConfig(model="student")),
        device=torch.device("cpu"),
        autocast=nullcontext,
        vocab_size=64,
        num_likeliest=4,
    )
    prompts = [np.array([5, 6, 7, 8, 9], np.int32), np.array([9, 3], np.int32), np.array([4, 9], np.int32)]
    texts = sampler.write(prompts, RolloutConfig(max_new_tokens=6), max_sequence_tokens=32, seeds=[1, 2, 3])
    for prompt, (text, *_) in zip(prompts, texts, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, text.token_ids]).astype(np.int64)).unsqueeze(0)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
        np.testing.assert_allclose(text.logprobs, logprobs.numpy(), atol=1e-4)
    assert sampler._mode == mode
