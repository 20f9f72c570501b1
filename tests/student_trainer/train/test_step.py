"""One optimizer step: cutting its targets into chunks saves memory and changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import json_format

from protos.stillhouse.v1.run_pb2 import RunSpec
from protos.tensor_codec import Distributions
from student_trainer.config import RunConfig, from_proto
from student_trainer.train import step
from student_trainer.train.batch import Scored
from student_trainer.train.checkpoint import Progress
from student_trainer.train.device import make_accelerator
from student_trainer.train.optim import make_optimizer
from student_trainer.train.prompts import Example
from student_trainer.train.sources import StepData
from student_trainer.train.student import Student, load_tokenizer
from tests.conftest import Models

TOP_K = 8


def _scored(vocab_size: int) -> list[Scored]:
    """Four ragged sequences with the answers of a teacher of random logits."""
    random = np.random.default_rng(0)
    scored = []
    for length in (5, 9, 17, 30):
        logits = torch.from_numpy(random.normal(size=(length - 1, vocab_size)) * 3)
        top = logits.log_softmax(-1).topk(TOP_K, -1)
        token_ids = random.integers(4, vocab_size, length, dtype=np.int32)
        answer = Distributions(
            start=1,
            token_ids=top.indices.int().numpy(),
            logprobs=top.values.float().numpy(),
            target_logprobs=np.zeros(length - 1, np.float32),
            log_tail=torch.log1p(-top.values.exp().sum(-1)).float().numpy(),
        )
        mask = np.arange(length) > 0
        scored.append(
            Scored(example=Example(token_ids=token_ids, mask=mask, place=f"row {length}"), answer=answer)
        )
    return scored


def _take(config: RunConfig, data_dir: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    tokenizer = load_tokenizer(config.student, data_dir)
    student = Student.load(
        config.student, tokenizer, data_dir=data_dir, device=torch.device("cpu"), precision="fp32", seed=0
    )
    stepper = step.Stepper(
        student,
        make_optimizer(student.trained(), config.optimizer),
        make_accelerator(config.optimizer),
        config,
        total_steps=1,
        vocab_size=len(tokenizer),
    )
    data = StepData(step=0, scored=_scored(len(tokenizer)), teacher_wait_s=0.0)
    metrics = stepper.take(data, Progress())
    return metrics, {name: weight.detach().clone() for name, weight in student.trained().items()}


def test_chunks_of_targets_change_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {
        "student": {"model": str(models.student)},
        "teachers": [{"targets": ["127.0.0.1:1"]}],
        "data": {"train": [{"path": "unused.jsonl"}]},
        "loss": {"top_k": TOP_K, "hard_weight": 0.5},
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "warmup_fraction": 0, "lr_scheduler": "constant"},
    }
    config = from_proto(json_format.ParseDict(spec, RunSpec()))
    whole_metrics, whole = _take(config, tmp_path)
    monkeypatch.setattr(step, "CHUNK_LOGITS", 7 * 400)
    metrics, weights = _take(config, tmp_path)
    for name in (
        "train/loss",
        "train/forward_kl",
        "train/cross_entropy",
        "train/teacher_mass",
        "train/grad_norm",
    ):
        assert metrics[name] == pytest.approx(whole_metrics[name], rel=1e-5), name
    for name, weight in whole.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)
