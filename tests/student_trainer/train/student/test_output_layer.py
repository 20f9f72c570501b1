"""Output layers with which a loss may be fused: structure decides, not the size of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.train.student.lm_head import LmHead
from stillhouse.student_trainer.train.student.student import Student
from tests.support.tiny_architectures import tiny_model


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
