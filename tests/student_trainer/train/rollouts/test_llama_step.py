"""Decoding by LlamaStep: the tokens and log-probabilities of transformers' own passes, with adapters and in half precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.student_trainer.train.rollouts import llama_step
from stillhouse.student_trainer.train.rollouts.continuous_batch import DecodeRow, decode

CPU = torch.device("cpu")
SMALLEST_WEIGHT = 32 * 32
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "LoRA": {"target_modules": "all-linear", "lora_dropout": 0.5},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
}


def _model(adapter: dict[str, Any] | None) -> Any:
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    model: Any = transformers.Qwen2ForCausalLM(config)
    if adapter is not None:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **adapter))
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * 0.2
    return model.eval()


class _Tokens:
    """Keys and values of one layer."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self._kept.append((key_states, value_states))
        keys, values = zip(*self._kept, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def _decode(model: Any, *, lean: bool) -> dict[tuple[int, int], Tensor]:
    """Logits [V] behind which each token of each row is drawn, the likeliest one, by row and token."""
    rows = [
        DecodeRow(np.arange(3, 3 + length, dtype=np.int32), room)
        for length, room in ((5, 9), (2, 3), (7, 6), (1, 12), (3, 8))
    ]
    seen: dict[tuple[int, int], Tensor] = {}

    def draw(rows_B: Tensor, drawn_B: Tensor, logits_BV: Tensor) -> Tensor:
        seen.update(zip(zip(rows_B.tolist(), drawn_B.tolist(), strict=True), logits_BV.float(), strict=True))
        return logits_BV.argmax(-1)

    with torch.no_grad():
        counts = decode(model, rows, draw, end_ids=[9], max_rows=3, max_tokens=None, device=CPU, lean=lean)
    return {(row, token): logits for (row, token), logits in seen.items() if token < counts[row]}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logits_are_those_of_the_models_own_passes(adapter: str) -> None:
    model = _model(ADAPTERS[adapter])
    assert llama_step.decodes(model)
    lean, expected = (_decode(model, lean=each) for each in (True, False))
    assert lean.keys() == expected.keys()
    for place, logits in expected.items():
        torch.testing.assert_close(lean[place], logits, atol=1e-4, rtol=1e-4)


def test_autocast_decodes_in_its_precision() -> None:
    model = _model(ADAPTERS["LoRA"])
    with torch.autocast("cpu", torch.bfloat16):
        lean, expected = (_decode(model, lean=each)[0, 1] for each in (True, False))
    assert (lean - expected).abs().mean() < 0.05 * expected.std()


class _Casts(TorchDispatchMode):
    """Counts copies of matrices in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._to_copy.default and args[0].numel() >= SMALLEST_WEIGHT
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapter", ["none", "LoRA"])
def test_autocast_casts_no_weight_for_every_token(adapter: str) -> None:
    model, ids = _model(ADAPTERS[adapter]), torch.tensor([3, 4])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        step = llama_step.LlamaStep(model, 8)
        memory = [_Tokens() for _ in range(2)]
        with _Casts() as casts:
            for place in range(3):
                step(ids, torch.full((2,), place), None, memory)
    assert casts.number == 0


def test_models_of_other_shapes_and_with_growing_rotations_keep_their_own_passes() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    assert not llama_step.decodes(transformers.GPT2LMHeadModel(config))
    model = _model(None)
    model.model.rotary_emb.rope_type = "dynamic"
    assert not llama_step.decodes(model)
