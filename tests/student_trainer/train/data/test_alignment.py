"""Alignment: each row of logits meets the teacher's row for the same token, for any padding and mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.train.batching.collate import ScoredExample, collate, total_weight
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.student.student import Student, load_tokenizer
from tests.conftest import Models
from tests.student_trainer.train.loss.single_losses import forward_kl

CPU = torch.device("cpu")
# Prompt and response lengths; a prompt of one token, a response of one, and a gap between two turns.
MASKS = [
    [False, True],
    [False, True, True, True, True],
    [False, False, False, True],
    [False, False, True, True, False, False, True, False],
]


@pytest.fixture(scope="module")
def student(models: Models) -> Student:
    config = StudentConfig(model=str(models.teacher))
    tokenizer = load_tokenizer(config, Path())
    return Student.load(config, tokenizer, data_dir=Path(), device=CPU, precision="fp32", seed=0)


def _examples() -> list[Example]:
    generator = np.random.default_rng(5)
    return [
        Example(
            token_ids=generator.integers(0, 300, len(mask)).astype(np.int32),
            mask=np.array(mask),
            place=f"row {number}",
        )
        for number, mask in enumerate(MASKS)
    ]


def _full_logprobs(student: Student, example: Example) -> torch.Tensor:
    """Returns the model's log-probabilities without padding, [T, V]."""
    with torch.no_grad():
        token_ids = torch.from_numpy(example.token_ids).long().unsqueeze(0)
        logits: Any = student.model(input_ids=token_ids).logits
    return logits[0].log_softmax(-1)  # type: ignore[no-any-return]


def _answer(student: Student, example: Example, top_k: int) -> Distributions:
    """Returns the outputs of a teacher with the student's weights: row t predicts token start + t from the tokens before it."""
    logprobs = _full_logprobs(student, example)[example.start - 1 : -1].double()
    kept, token_ids = logprobs.topk(top_k, dim=-1)
    tail = logprobs.scatter(-1, token_ids, -torch.inf).logsumexp(-1)
    targets = torch.from_numpy(example.token_ids[example.start :]).long().unsqueeze(-1)
    return Distributions(
        start=example.start,
        token_ids=token_ids.int().numpy(),
        logprobs=kept.float().numpy(),
        target_logprobs=logprobs.gather(-1, targets).squeeze(-1).float().numpy(),
        log_tail=tail.float().numpy(),
    )


def test_logits_are_those_before_each_target(student: Student) -> None:
    examples = _examples()
    batch = collate(
        [ScoredExample(example=each, answer=None) for each in examples], reduction="token_mean", device=CPU
    )
    with torch.no_grad():
        logprobs = student.logits(batch)[0].log_softmax(-1)
    expected = torch.cat([_full_logprobs(student, each)[np.flatnonzero(each.mask) - 1] for each in examples])
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    targets = np.concatenate([each.token_ids[each.mask] for each in examples])
    assert batch.positions.target_ids[0].tolist() == targets.tolist()


def test_a_model_without_logits_to_keep_gives_the_same(student: Student) -> None:
    batch = collate(
        [ScoredExample(example=each, answer=None) for each in _examples()], reduction="token_mean", device=CPU
    )
    with torch.no_grad():
        expected = student.logits(batch)
        student._keeps_logits = False
        try:
            found = student.logits(batch)
        finally:
            student._keeps_logits = True
    torch.testing.assert_close(found, expected)


def test_every_position_meets_its_own_answer(student: Student) -> None:
    scored = [ScoredExample(example=each, answer=_answer(student, each, 16)) for each in _examples()]
    batch = collate(scored, reduction="token_mean", device=CPU)
    assert batch.positions.targets is not None
    with torch.no_grad():
        logits = student.logits(batch)
        total = forward_kl(logits, batch.positions.targets, batch.positions.weights).loss_sum.item()
        shifted = forward_kl(
            logits.roll(1, dims=1), batch.positions.targets, batch.positions.weights
        ).loss_sum.item()
    assert abs(total) < 1e-4
    assert shifted > 1


@pytest.mark.parametrize(("reduction", "expected"), [("token_mean", 9), ("sequence_mean", 4)])
def test_weights_sum_to_the_denominator(reduction: Any, expected: int) -> None:
    examples = _examples()
    batch = collate(
        [ScoredExample(example=each, answer=None) for each in examples], reduction=reduction, device=CPU
    )
    assert batch.positions.weights.sum().item() == pytest.approx(expected)
    assert total_weight(examples, reduction) == pytest.approx(expected)
