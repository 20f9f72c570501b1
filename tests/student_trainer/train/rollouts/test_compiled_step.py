"""Decoding by CompiledStep: the logits of transformers' own passes, and rows that do not depend on each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from stillhouse.student_trainer.train.rollouts import llama_step
from stillhouse.student_trainer.train.rollouts.compiled_step import CompiledStep, compiles
from stillhouse.student_trainer.train.rollouts.continuous_batch import DecodeRow, decode

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 70,  # no multiple of a panel
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}
MODELS: dict[str, Any] = {
    "biases, heads of 16 units": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES | {"hidden_size": 64})
    ),
    "norms of heads, 48 units": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, head_dim=48)
    ),
    "a head of keys for each, 32 units": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 4}, head_dim=32, mlp_bias=True)
    ),
    "adapter": lambda: get_peft_model(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, head_dim=32)),
        LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.5),
    ),
}


def _model(name: str) -> Any:
    torch.manual_seed(1)
    model: Any = MODELS[name]()
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * 0.2
    return model.eval()


def _decode(model: Any, *, lean: bool) -> dict[tuple[int, int], Tensor]:
    """Logits [V] behind which each token of each row is drawn, the likeliest one, by row and token."""
    rows = [
        DecodeRow(np.arange(3, 3 + length, dtype=np.int32), room)
        for length, room in ((5, 9), (2, 3), (7, 80), (1, 12), (3, 8), (4, 30), (2, 70))
    ]
    seen: dict[tuple[int, int], Tensor] = {}

    def draw(rows_B: Tensor, drawn_B: Tensor, logits_BV: Tensor) -> Tensor:
        seen.update(zip(zip(rows_B.tolist(), drawn_B.tolist(), strict=True), logits_BV, strict=True))
        return logits_BV.argmax(-1)

    with torch.no_grad():
        counts = decode(model, rows, draw, end_ids=[9], max_rows=5, max_tokens=None, device=CPU, lean=lean)
    return {(row, token): logits for (row, token), logits in seen.items() if token < counts[row]}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_models_own_passes(name: str) -> None:
    model = _model(name)
    assert llama_step.decodes(model)
    assert compiles(model)
    lean, expected = (_decode(model, lean=each) for each in (True, False))
    assert lean.keys() == expected.keys()
    for place, logits in expected.items():
        torch.testing.assert_close(lean[place], logits, atol=1e-4, rtol=1e-4)


class _Tokens:
    """Keys and values of one layer, all made beforehand."""

    def __init__(self, states_2BNLD: Tensor, length: int) -> None:
        self._keys, self._values = states_2BNLD
        self._length = length

    def grow(self) -> tuple[Tensor, Tensor, int]:
        self._length += 1
        return self._keys, self._values, self._length - 1


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    step = CompiledStep(_model("biases, heads of 16 units"), 64)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 2, 13, 2, 24, 16, generator=generator)
    ids, positions = torch.arange(13), torch.arange(13) + 3
    padding = 17 - positions.numpy()

    def logits(rows: list[int]) -> Tensor:
        memory = [_Tokens(layer[:, rows].clone(), 17) for layer in states]
        with torch.no_grad():
            return step(ids[rows], positions[rows], padding[rows], memory)

    together = logits(list(range(13)))
    for rows in ([0], [12], [3, 7], [5, 4, 3, 2, 1], [2, 4, 6, 8, 10, 12, 1, 3, 5]):
        assert torch.equal(logits(rows), together[rows])


def test_other_models_are_not_compiled() -> None:
    model = _model("biases, heads of 16 units")
    with torch.autocast("cpu", torch.bfloat16):
        assert not compiles(model)
    assert not compiles(_model("biases, heads of 16 units").bfloat16())
    narrow = transformers.Qwen2Config(**SIZES)
    assert not compiles(transformers.Qwen2ForCausalLM(narrow))
    gelu = transformers.LlamaConfig(**SIZES, head_dim=32, hidden_act="gelu")
    assert not compiles(transformers.LlamaForCausalLM(gelu))
    wide = transformers.LlamaConfig(**SIZES | {"vocab_size": 200_000}, head_dim=32)
    assert not compiles(transformers.LlamaForCausalLM(wide))
