"""The main path with all three programs as processes: create, watch, complete, pull; stop and resume on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from stillhouse.client.api import Trainer
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.conftest import Models
from tests.support.programs import Program
from tests.support.runs import Service, completed, curve, small_spec, training_pid, wait_until, write_run_file


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_run_is_created_watched_completed_and_pulled(
    *,
    engine: str,
    request: pytest.FixtureRequest,
    service: Service,
    models: Models,
    dataset_file: Path,
    tmp_path: Path,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher: Program = request.getfixturevalue(f"{engine}_teacher")
    spec = small_spec(student=models.student, train=dataset_file, teacher=teacher.target, steps=12)
    file = write_run_file(tmp_path / "run.yaml", spec)

    watched = service.stillhouse("run", "create", str(file), "--watch", "--json")
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    assert "COMPLETED" in watched.stdout
    assert len(events) > 12

    service.stillhouse("run", "pull", "latest", "--to", str(tmp_path / "final"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.tensor([tokenizer(models.texts[0])["input_ids"]])
    assert torch.isfinite(model(ids).logits).all()

    with Trainer(service.target) as client:
        evaluations = curve(client.run("latest"), "eval/kl")
    assert list(evaluations) == [0, 12]
    assert evaluations[12] < evaluations[0]


def test_stopping_and_resuming_from_the_command_line_gives_the_same_curve(
    *,
    hf_teacher: Program,
    service: Service,
    trainer: Trainer,
    models: Models,
    dataset_file: Path,
    tmp_path: Path,
) -> None:
    spec = small_spec(student=models.student, train=dataset_file, teacher=hf_teacher.target, steps=150)
    file = write_run_file(tmp_path / "run.yaml", spec)
    undisturbed = trainer.create_run(file)
    created = service.stillhouse("run", "create", str(file), "--json")
    stopped = trainer.run(json.loads(created.stdout)["name"])

    wait_until(lambda: stopped.get().progress.step > 20, "step 20")
    pid = training_pid(service, stopped.name, attempt=1)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # or it might complete while the command line starts
    service.stillhouse("run", "stop", stopped.id)
    os.kill(pid, signal.SIGCONT)
    run = stopped.wait()
    assert run.state == Run.STATE_STOPPED
    assert 0 < run.progress.step < 150

    service.stillhouse("run", "resume", stopped.id, "--watch")
    completed(undisturbed, service)
    resumed = stopped.get()
    assert resumed.state == Run.STATE_COMPLETED
    assert resumed.attempts[1].first_step == run.progress.step + 1
    assert curve(stopped) == curve(undisturbed)
    shown = service.stillhouse("run", "metrics", stopped.id, "--key", "train/loss", "--json").stdout
    assert "train/loss" in shown
