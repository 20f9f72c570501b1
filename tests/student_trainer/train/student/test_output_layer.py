"""Structures that allow a loss fused with the output layer, and several sequences in one row, whatever the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.protos.errors import StillhouseError
from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.train.student.lm_head import LmHead
from stillhouse.student_trainer.train.student.packing_check import check_packing
from stillhouse.student_trainer.train.student.student import Student
from tests.student_trainer.train.student.tiny_architectures import tiny_model


def _student(kind: str, **settings: Any) -> Student:
    return Student(tiny_model(kind, **settings), None, StudentConfig(model=kind))


@pytest.mark.parametrize(
    ("kind", "settings", "is_plain"),
    [
        ("qwen2", {}, True),
        ("gpt2", {}, True),
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("gemma2", {"final_logit_softcapping": 30.0}, False),
        ("granite", {"logits_scaling": 1.0}, True),
        ("granite", {"logits_scaling": 8.0}, False),
        ("cohere", {"logit_scale": 0.0625}, False),
    ],
)
def test_capped_and_scaled_logits_are_no_plain_output_layer(
    kind: str, settings: dict[str, Any], is_plain: bool
) -> None:
    assert (LmHead(_student(kind, **settings)).layer is not None) == is_plain


def test_a_cap_that_no_setting_names_is_found_on_fresh_weights() -> None:
    student = _student("qwen2")
    forward = student.model.forward

    def capped(*args: Any, **options: Any) -> Any:
        outputs = forward(*args, **options)
        outputs.logits = _cap(outputs.logits)
        return outputs

    student.model.forward = capped
    assert LmHead(student).layer is None


def _cap(logits: Tensor) -> Tensor:
    return 50 * torch.tanh(logits / 50)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma2", "mixtral"])
def test_attention_that_positions_restart_is_packed(kind: str) -> None:
    check_packing(_student(kind), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["lfm2", "mamba"])
def test_convolutions_and_states_are_not_packed_even_if_their_weights_are_small(kind: str) -> None:
    with pytest.raises(StillhouseError, match="mixes sequences packed into one row"):
        check_packing(_student(kind), torch.device("cpu"))


def test_a_leak_below_the_spread_of_fresh_logits_is_found() -> None:
    student = _student("qwen2")
    embedding: Any = student.model.get_input_embeddings()  # type: ignore[operator]

    def leak(_module: Any, _inputs: Any, hidden: Tensor) -> Tensor:
        return hidden + 1e-2 * torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]

    embedding.register_forward_hook(leak)
    with pytest.raises(StillhouseError, match="depend on the tokens of those before"):
        check_packing(student, torch.device("cpu"))
