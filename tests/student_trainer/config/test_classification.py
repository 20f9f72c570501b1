"""Settings of a classifier's run: defaults of its own, and a refusal by name of what only language models have."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from tests.student_trainer.config.specs import SMALLEST, changed


def classifier(path: str, value: Any) -> RunSpec:
    spec = changed(path, value)
    spec.task = "sequence_classification"
    return spec


def test_a_classifiers_spec_reads_back_as_itself() -> None:
    spec = json_format.ParseDict({**SMALLEST, "task": "sequence_classification"}, RunSpec())
    config = from_proto(spec)
    assert config.evaluation.metrics == ("accuracy", "f1", "ece", "kl", "agreement")
    assert from_proto(to_proto(config)) == config


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("loss.top_k", 64, "loss.top_k"),
        ("loss.sparse_target", "tail_bucket", "loss.sparse_target"),
        ("loss.num_samples", 8, "loss.num_samples"),
        ("loss.temperature_mode", "conditional", "loss.temperature_mode"),
        ("loss.reduction", "sequence_mean", "loss.reduction"),
        ("loss.foreign_tokenizer", "alm", "loss.foreign_tokenizer"),
        ("loss.terms", [{"token_weighting": "teacher_entropy"}], "loss.terms[0].token_weighting"),
        ("data.packing", True, "data.packing"),
        ("data.chat", True, "data.chat"),
        ("data.completion_only", False, "data.completion_only"),
        ("contexts", [{"teacher": {}}], "contexts"),
        ("contexts", [{"student": {}}], "contexts"),
        ("evaluation.metrics", ["perplexity"], "evaluation.metrics"),
        ("student.quantization", "nf4", "student.quantization"),
        ("data.classes", ["a", "a"], "data.classes"),
        ("data.classes", ["a"], "data.classes"),
    ],
)
def test_settings_of_language_models_are_refused_by_name(path: str, value: Any, field: str) -> None:
    with pytest.raises(StillhouseError) as caught:
        from_proto(classifier(path, value))
    assert field in {each.field for each in caught.value.violations}


@pytest.mark.parametrize(("path", "value"), [("data.classes", ["a", "b"]), ("evaluation.metrics", ["f1"])])
def test_settings_of_classifiers_are_refused_elsewhere(path: str, value: Any) -> None:
    with pytest.raises(StillhouseError, match="task is distil"):
        from_proto(changed(path, value))
