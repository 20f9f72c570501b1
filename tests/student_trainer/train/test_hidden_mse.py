"""Hidden states in the objective: against a local computation, for a copy of the teacher's layers, and where they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.protos.errors import StillhouseError
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from tests.conftest import Models
from tests.student_trainer.config.specs import SMALLEST, changed
from tests.student_trainer.config.specs import spec_of as run_spec
from tests.student_trainer.train.runs import failure, metric, spec_of
from tests.support.programs import Program

Run = Callable[..., RunDir]
HIDDEN = {"weight": 3.0}


def pre_distillation(models: Models, data: Path, target: str, **loss: Any) -> dict[str, Any]:
    """The older system's warm start: 0.8 T² KL + 0.2 cross-entropy + hidden states, of a copy of one of two layers."""
    return spec_of(
        models.teacher,
        data,
        target,
        student={"model": str(models.teacher), "keep_layers": [1]},
        loss={
            "terms": [{"weight": 0.8}],
            "hard_weight": 0.2,
            "temperature": 2.0,
            "sparse_target": "tail_bucket",
            "hidden_mse": HIDDEN,
            **loss,
        },
    )


@pytest.mark.model
@pytest.mark.parametrize("normalise", [False, True])
def test_the_term_is_that_of_a_local_computation(
    run: Run, models: Models, hf_teacher: Program, tmp_path: Path, *, normalise: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = models.texts[0]
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n")
    spec = pre_distillation(models, data, hf_teacher.target, hidden_mse={**HIDDEN, "normalise": normalise})
    spec["data"]["eval_fraction"] = 0.0
    run_dir = run(spec)
    tokenizer = AutoTokenizer.from_pretrained(models.teacher)
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    teacher = AutoModelForCausalLM.from_pretrained(models.teacher).double().eval()
    student = AutoModelForCausalLM.from_pretrained(models.teacher).double().eval()
    student.model.layers = torch.nn.ModuleList([student.model.layers[1]])
    student.model.layers[0].self_attn.layer_idx = 0
    student.config.num_hidden_layers = 1
    with torch.no_grad():
        states = [each.model(ids, use_cache=False).last_hidden_state[0, :-1] for each in (teacher, student)]
    if normalise:
        states = [torch.nn.functional.layer_norm(each, each.shape[-1:]) for each in states]
    wanted = (states[0] - states[1]).square().mean().item()
    assert metric(run_dir, "train/hidden_mse")[1] == pytest.approx(wanted, rel=1e-5)
    parts = {
        name: metric(run_dir, f"train/{name}")[1] for name in ("forward_kl", "cross_entropy", "hidden_mse")
    }
    loss = 0.8 * 4 * parts["forward_kl"] + 0.2 * parts["cross_entropy"] + 3 * parts["hidden_mse"]
    assert metric(run_dir, "train/loss")[1] == pytest.approx(loss, rel=1e-5)


@pytest.mark.model
def test_a_copy_of_layers_comes_nearer_and_the_teacher_itself_is_at_0(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    hidden = metric(run(pre_distillation(models, dataset_file, hf_teacher.target)), "train/hidden_mse")
    assert hidden[max(hidden)] < 0.9 * hidden[1]
    spec = pre_distillation(models, dataset_file, hf_teacher.target)
    spec["student"] = {"model": str(models.teacher)}
    spec["optimizer"]["learning_rate"] = 1e-12
    assert max(metric(run(spec), "train/hidden_mse").values()) < 1e-9


@pytest.mark.model
def test_a_student_of_another_width_is_refused(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    spec = spec_of(models.student, dataset_file, hf_teacher.target, loss={"hidden_mse": HIDDEN})
    run_dir = run(spec, code=EXIT_FAILED)
    assert "the teacher's have 64 units and the student's 32" in failure(run_dir)


@pytest.mark.parametrize(
    "others",
    [
        {"cache": {"path": "caches/x"}},
        {"contexts": [{"student": {}}]},
        {"teachers": [{"name": name, "targets": ["127.0.0.1:7401"]} for name in ("a", "b")]},
        {"task": "sequence_classification"},
    ],
)
def test_what_has_no_hidden_states_is_refused_at_create(others: dict[str, Any]) -> None:
    with pytest.raises(StillhouseError, match=r"loss\.hidden_mse"):
        from_proto(run_spec({**SMALLEST, "loss": {"hidden_mse": HIDDEN}, **others}))
    assert from_proto(changed("loss.hidden_mse", HIDDEN)).loss.compares_hidden
