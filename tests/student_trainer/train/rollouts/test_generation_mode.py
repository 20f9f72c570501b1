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
from stillhouse.student_trainer.train.rollouts.generation_mode import Batch, GenerationMode
from stillhouse.student_trainer.train.rollouts.local_sampler import LocalSampler
from stillhouse.student_trainer.train.student.student import Student

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48}
FAMILIES: dict[str, tuple[GenerationMode, dict[str, Any]]] = {
    "Qwen2": (GenerationMode(True, "continuous", lean=True), HEADS),
    "Qwen3": (
        GenerationMode(True, "continuous", lean=True),
        {**HEADS, "num_key_value_heads": 1, "head_dim": 16},
    ),
    "Llama": (GenerationMode(True, "continuous", lean=True), {**HEADS, "attention_bias": True}),
    "OPT": (
        GenerationMode(True, "continuous"),
        {**SIZES, "num_attention_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "Gemma2": (GenerationMode(True, "padded"), {**HEADS, "head_dim": 16, "sliding_window": 8}),
    "Mamba": (GenerationMode(True, "padded"), {**SIZES, "state_size": 8}),
    "Rwkv": (GenerationMode(True, "single"), {**SIZES, "attention_hidden_size": 32}),
    "RecurrentGemma": (
        GenerationMode(True, "equal"),
        {**HEADS, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    ),
}


def _sampler(model: Any, mode: GenerationMode | None = None) -> LocalSampler:
    """A sampler of a model without an end token, in `mode` if it is given."""
    model.generation_config.eos_token_id = None
    sampler = LocalSampler(
        Student(model, SimpleNamespace(eos_token_id=None), StudentConfig(model="student")),
        device=torch.device("cpu"),
        autocast=nullcontext,
        vocab_size=64,
        num_likeliest=4,
    )
    sampler._mode = mode
    return sampler


def test_a_small_model_writes_with_one_thread_and_gives_the_others_back() -> None:
    config = transformers.LlamaConfig(**HEADS)
    sampler = _sampler(transformers.LlamaForCausalLM(config).eval())
    seen: list[int] = []

    def autocast() -> Any:
        seen.append(torch.get_num_threads())
        return nullcontext()

    sampler._autocast = autocast
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sampler.write(
            [np.array([5], np.int32)], RolloutConfig(max_new_tokens=1), max_sequence_tokens=8, seeds=[1]
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


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
    sampler = _sampler(model)
    prompts = [np.array([5, 6, 7, 8, 9], np.int32), np.array([9, 3], np.int32), np.array([4, 9], np.int32)]
    texts = sampler.write(prompts, RolloutConfig(max_new_tokens=6), max_sequence_tokens=32, seeds=[1, 2, 3])
    for prompt, (text, *_) in zip(prompts, texts, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, text.token_ids]).astype(np.int64)).unsqueeze(0)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
        np.testing.assert_allclose(text.logprobs, logprobs.numpy(), atol=1e-4)
    assert sampler._mode == mode


@pytest.mark.parametrize("batch", ["continuous", "padded"])
def test_a_row_that_ends_at_the_last_position_of_the_model_waits_there_for_the_others(batch: Batch) -> None:
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    # The longest two end first, at different times; they are too few to leave the batch.
    prompts = [np.arange(3, 3 + length, dtype=np.int32) for length in (13, 11, *[2] * 22)]
    settings = RolloutConfig(max_new_tokens=14, samples_per_prompt=1)
    limits: dict[str, Any] = {"max_sequence_tokens": 16}
    seeds = list(range(len(prompts)))
    joint, single = (
        _sampler(model, GenerationMode(True, each)).write(prompts, settings, **limits, seeds=seeds)
        for each in (batch, "single")
    )
    assert [len(text.token_ids) for [text] in joint] == [3, 5, *[14] * 22]
    for [text], [alone] in zip(joint, single, strict=True):
        assert text.token_ids.tolist() == alone.token_ids.tolist()
        np.testing.assert_allclose(text.logprobs, alone.logprobs, atol=1e-5)
