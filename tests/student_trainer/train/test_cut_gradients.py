"""Gradients of an update: the same to 1e-6 in float64 for every loss, however its rows are cut into passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import json_format

from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.fields import Choices, fields_of
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.config.rules.loss import STUDENT_TAIL, why_no_tail_draws
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig, RunConfig
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.batching.passes import PassCutter
from stillhouse.student_trainer.train.checkpointing.checkpoint import Progress
from stillhouse.student_trainer.train.contexts.source import StepData
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.setup.stretched_rows import stretched
from stillhouse.student_trainer.train.step import Stepper
from stillhouse.student_trainer.train.student.device import make_accelerator
from stillhouse.student_trainer.train.student.student import Student
from tests.conftest import Models
from tests.student_trainer.train.students import load_student

TOP_K, NUM_DRAWS = 8, 6
TEMPERATURE = 2.0
LENGTHS = (5, 9, 17, 30, 12, 3)
CUTS = {
    "single rows": PassCutter(max_tokens=1),
    "padded": PassCutter(max_tokens=40, pass_tokens=9),
    "some packed": PassCutter(max_tokens=60, packing="cheaper", attention_tokens=40, pass_tokens=9),
    "packed": PassCutter(max_tokens=64, packing="always"),
    "by rows": PassCutter(max_rows=4),
}


def choices(of: type[Any], name: str) -> tuple[str, ...]:
    return fields_of(of)[name].rule(Choices) or ()


def losses() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every divergence, estimator, weighting, form of targets, temperature and denominator, by name."""
    for divergence in choices(LossTermConfig, "divergence"):
        yield divergence, {"terms": [{"divergence": divergence}]}
    for weighting in choices(LossTermConfig, "token_weighting"):
        terms = [{"token_weighting": weighting, "weight": 0.7}, {"divergence": "tvd", "weight": 0.2}]
        yield weighting, {"terms": terms, "hard_weight": 0.4, "reduction": "sequence_mean"}
    for form in sorted(
        {*choices(LossConfig, "sparse_target")} - {"auto", STUDENT_TAIL}
    ):  # auto is settled first
        yield form, {"sparse_target": form, "num_samples": NUM_DRAWS}
    yield (
        STUDENT_TAIL,
        {
            "sparse_target": STUDENT_TAIL,
            "num_samples": NUM_DRAWS,
            "terms": [{"divergence": "reverse_kl"}],
        },
    )
    drawable = [
        each
        for each in choices(LossTermConfig, "divergence")
        if not why_no_tail_draws(LossTermConfig(divergence=each))
    ]
    for divergence in drawable:
        loss = {
            "terms": [{"divergence": divergence}],
            "sparse_target": "sampled_tail",
            "num_samples": NUM_DRAWS,
        }
        yield f"sampled_tail, {divergence}", loss
    for mode in choices(LossConfig, "temperature_mode"):
        yield mode, {"temperature": TEMPERATURE, "temperature_mode": mode}
    for baseline in choices(LossTermConfig, "baseline"):
        terms = [{"divergence": "reverse_kl", "estimator": "policy_gradient", "baseline": baseline}]
        yield baseline, {"terms": terms}
    yield "text alone", {"terms": [{"weight": 0}], "hard_weight": 1.0, "reduction": "sequence_mean"}


def scored_rows(vocab_size: int, *, rollouts: bool) -> list[ScoredExample]:
    """Ragged rows, with the answers of a teacher of random logits that hold all that a loss may use."""
    random = np.random.default_rng(0)
    scored = []
    for number, length in enumerate(LENGTHS):
        logits = torch.from_numpy(random.normal(size=(length - 1, vocab_size)) * 3)
        top = logits.log_softmax(-1).topk(TOP_K, -1)
        draws = torch.multinomial(
            logits.softmax(-1), NUM_DRAWS, replacement=True, generator=torch.Generator().manual_seed(0)
        )
        answer = Distributions(
            start=1,
            token_ids=top.indices.int().numpy(),
            logprobs=top.values.float().numpy(),
            target_logprobs=random.normal(-3, 1, length - 1).astype(np.float32),
            log_tail=torch.log1p(-top.values.exp().sum(-1)).float().numpy(),
            log_partitions=((logits.log_softmax(-1) / TEMPERATURE).logsumexp(-1)).float().numpy()[:, None],
            sampled_token_ids=draws.int().numpy(),
            sampled_logprobs=logits.log_softmax(-1).gather(-1, draws).float().numpy(),
        )
        example = Example(
            token_ids=random.integers(4, vocab_size, length, dtype=np.int32),
            mask=np.arange(length) > (length // 3 if not rollouts else 0),
            place=f"row {length}",
        )
        behaviour = random.normal(-3, 1, length - 1).astype(np.float32) if rollouts else None
        scored.append(
            ScoredExample(
                example=example,
                answer=answer,
                behaviour_logprobs=behaviour,
                draw_logprobs=np.full(draws.shape, -2, np.float32) if rollouts else None,
                group=number // 3,
            )
        )
    return scored


class Recorder(torch.optim.SGD):
    """Keeps the gradient of a step instead of taking it."""

    gradient: torch.Tensor

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        del closure
        parameters = self.param_groups[0]["params"]
        self.gradient = torch.cat([each.grad.flatten() for each in parameters if each.grad is not None])


@pytest.fixture(scope="module")
def student(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Student:
    """A tiny student in float64."""
    found = load_student(config_of(models, {}).student, tmp_path_factory.mktemp("data"))
    found.model.double()
    return found


def config_of(models: Models, loss: Mapping[str, Any], *, rollouts: bool = False) -> RunConfig:
    spec = {
        "student": {"model": str(models.student)},
        "teachers": [{"targets": ["127.0.0.1:1"]}],
        "data": {"train": [{"path": "unused.jsonl"}]},
        "contexts": [{"student": {}}] if rollouts else [{"dataset": {}}],
        "loss": {"top_k": TOP_K, "sparse_target": "tail_bucket", **loss},
        "optimizer": {"max_grad_norm": 0},
    }
    return from_proto(json_format.ParseDict(spec, RunSpec()))


@pytest.mark.parametrize("fused", [True, False])
def test_any_cut_gives_the_same_gradient(
    models: Models, student: Student, monkeypatch: pytest.MonkeyPatch, *, fused: bool
) -> None:
    if not fused:
        monkeypatch.setattr(
            "stillhouse.student_trainer.train.student.lm_head._plain_layer", lambda model: None
        )
    for name, loss in losses():
        rollouts = name == STUDENT_TAIL or "estimator" in loss.get("terms", [{}])[0]
        config = config_of(models, loss, rollouts=rollouts)
        recorder = Recorder(student.trainable_parameters().values(), lr=1.0)
        stepper = Stepper(
            student,
            recorder,
            make_accelerator(config.optimizer),
            config,
            total_steps=1,
            vocab_size=len(student.tokenizer),
        )
        rows = scored_rows(len(student.tokenizer), rollouts=rollouts)
        stepper.rehearse([stretched(rows[0], 50), stretched(rows[-1], 2)])
        assert all(each.grad is None for each in stepper.parameters), name
        expected = None
        for cut, cutter in CUTS.items():
            stepper.cutter = cutter
            stepper.take_step(StepData(step=0, scored=rows, teacher_wait_s=0.0), Progress())
            expected = recorder.gradient if expected is None else expected
            assert expected.norm() > 0
            difference = float((recorder.gradient - expected).norm() / expected.norm())
            assert difference < 1e-6, f"{name}, {cut}: {difference}"


def test_the_cuts_differ() -> None:
    found = [replace(cutter).cut(LENGTHS) for cutter in CUTS.values()]
    assert all(one != other for number, one in enumerate(found) for other in found[:number])
