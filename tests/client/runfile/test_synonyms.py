"""Hints for names of other trainers: the field with the same meaning, never one with another."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.client.runfile.fields import all_paths
from stillhouse.client.runfile.load import parse_fields
from stillhouse.client.runfile.synonyms import SYNONYMS
from stillhouse.protos.errors import StillhouseError


def hint(path: str) -> str:
    """The problem of a run file whose only field is the one at the dotted `path`."""
    *sections, name = path.split(".")
    values: Any = {name: 1}
    for section in reversed(sections):
        values = {section: [values] if section in ("terms", "teachers", "contexts") else values}
    with pytest.raises(StillhouseError) as caught:
        parse_fields(values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("optimizer.num_train_epochs", "optimizer.epochs"),
        ("optimizer.numTrainEpochs", "optimizer.epochs"),
        ("optimizer.gradient_accumulation_steps", "optimizer.batch_size"),
        ("optimizer.per_device_train_batch_size", "optimizer.batch_size"),
        ("batch_size", "optimizer.batch_size"),
        ("optimizer.bf16", "optimizer.precision"),
        ("optimizer.warmup_steps", "optimizer.warmup_fraction"),
        ("optimizer.max_length", "data.max_sequence_tokens"),
        ("student.lora_r", "student.lora.rank"),
        ("student.lora_alpha", "student.lora.alpha"),
        ("student.alpha", "student.lora.alpha"),
        ("student.load_in_4bit", "student.quantization"),
        ("loss.kl_div", "loss.terms[].divergence"),
        ("loss.T", "loss.temperature"),
        ("loss.alpha", "loss.hard_weight"),
        ("alpha", "loss.hard_weight"),
        ("evaluation.ppl", "evaluation.metrics"),
        ("evaluation.eval_steps", "evaluation.every_steps"),
        ("checkpoint.save_total_limit", "checkpoint.keep"),
        ("teachers.url", "teachers[].targets"),
        ("teacher_model", "teachers[].targets"),
        ("name", "display_name"),
    ],
)
def test_a_name_of_another_trainer_leads_to_the_field_of_that_meaning(path: str, field: str) -> None:
    assert f'"{field}"' in hint(path)


def test_a_unit_that_differs_is_said() -> None:
    assert "the share of all steps, not their number" in hint("optimizer.warmup_steps")
    assert "true leaves the prompt out" in hint("data.train_on_inputs")


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("optimizer.warmup_step", "did you mean"),
        ("optimizer.beta1", "beta"),
        ("optimizer.betas", '"loss.terms[].beta"'),
        ("loss.top_p", 'did you mean "top_k"'),
        ("evaluation.steps", "max_steps"),
        ("loss.mode", "belongs to"),
    ],
)
def test_no_hint_points_to_another_meaning(path: str, wrong: str) -> None:
    assert wrong not in hint(path).partition("the fields of")[0].partition(": ")[2]


def test_every_synonym_is_of_a_field_and_hides_none() -> None:
    paths = set(all_paths())
    assert set(SYNONYMS.values()) <= paths
    tops = {path for path in paths if "." not in path}
    assert not set(SYNONYMS) & tops
