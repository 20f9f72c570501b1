"""On-policy runs against vLLM on both sides: it scores the student's texts, and writes them with adapters that it loads while it serves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.client.api import Trainer
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher
from tests.support.runs import Service, completed, curve, small_spec

STEPS = 3
SHORT = {"max_new_tokens": 8, "samples_per_prompt": 2}


@pytest.fixture(scope="module")
def vllm_writer(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """vLLM on the student's base."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    with (
        no_process_left() as mark,
        start_teacher(
            models.student,
            engine="vllm",
            directory=tmp_path_factory.mktemp("vllm-writer"),
            options=[
                *("--dtype", "float32", "--max-adapters", "2"),
                *("--upload-dir", str(tmp_path_factory.mktemp("writer-uploads"))),
            ],
            environment=mark,
        ) as program,
    ):
        yield program


def context(loss: dict[str, Any], **source: Any) -> dict[str, Any]:
    term = {"divergence": "reverse_kl", **loss}
    student = {"generation": SHORT, "min_teacher_logprob": -1000, "max_staleness": 0, **source}
    return {"student": student, "loss": {"terms": [term], "top_k": 8}}


def test_vllm_scores_and_writes_for_both_forms_of_reverse_kl(
    *,
    models: Models,
    dataset_file: Path,
    vllm_teacher: Program,
    vllm_writer: Program,
    service: Service,
    trainer: Trainer,
) -> None:
    spec = small_spec(
        student=models.student,
        train=dataset_file,
        teacher=vllm_teacher.target,
        steps=STEPS,
        changes={"student": {"lora": {"rank": 4}, "output": "adapter"}},
    )
    spec["teachers"][0]["logprob_dtype"] = "float32"
    remote = {"rollout_target": vllm_writer.target}
    spec["contexts"] = [
        context({"estimator": "full"}, **remote),
        context({"estimator": "policy_gradient"}, **remote),
        context({"estimator": "policy_gradient"}),
    ]
    handle = trainer.create_run(spec)
    completed(handle, service)
    for name in ("train/loss", "train/reverse_kl", "train/policy_gradient"):
        assert sorted(curve(handle, name)) == list(range(1, STEPS + 1)), name
    # Every text was written by the very weights that learn from it: two programs agree about it but for rounding.
    assert all(abs(weight - 1) < 0.02 for weight in curve(handle, "train/importance_weight").values())
    assert set(curve(handle, "train/rollout_staleness").values()) == {0}
    assert set(curve(handle, "train/rollouts_dropped").values()) == {0}
    assert all(value > 0 for value in curve(handle, "train/reverse_kl").values())
