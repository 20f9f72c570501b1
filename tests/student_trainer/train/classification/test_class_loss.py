"""Losses over classes against dense float64 formulas, and the classes and labels that they are about."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.tensors.classes import class_row
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.classification.batch import collate_classes
from stillhouse.student_trainer.train.classification.classes import Classes
from stillhouse.student_trainer.train.classification.metrics import class_scores, f1
from stillhouse.student_trainer.train.classification.rows import Label, LabelledExample
from stillhouse.student_trainer.train.loss.objective import objective

NAMES = ("a", "b", "c", "d")
CLASSES = Classes(names=NAMES, numbered=NAMES)
ROWS = 6


def example(label: Label | None, number: int = 0) -> LabelledExample:
    mask = np.array([False, False, True])
    return LabelledExample(
        token_ids=np.array([2, 7 + number, 3], np.int32),
        mask=mask,
        place=f"rows.jsonl, row {number}",
        label=label,
    )


def logits(seed: int) -> torch.Tensor:
    return (
        torch.randn(ROWS, len(NAMES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    )


def loss_of(teacher: torch.Tensor, student: torch.Tensor, config: LossConfig) -> float:
    """The mean over rows, as a run computes it from float32 log-probabilities on the wire."""
    rows = teacher.log_softmax(-1).float().numpy()
    scored = [
        ScoredExample(example=example(NAMES[number % 4], number), answer=class_row(each, 3))
        for number, each in enumerate(rows)
    ]
    batch = collate_classes(
        scored, CLASSES, device=torch.device("cpu"), pad_id=0, temperature=config.temperature
    )
    here = batch.positions
    summed = objective(
        student.float().unsqueeze(0),
        here.target_ids,
        here.targets,
        here.weights,
        config,
        vocab_size=len(NAMES),
    )
    return summed.loss_sum.item() / ROWS


def dense(name: str, teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> float:
    log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    match name:
        case "forward_kl":
            values = (p * (log_p - log_q)).sum(-1)
        case "reverse_kl":
            values = (q * (log_q - log_p)).sum(-1)
        case "jsd":
            log_m = ((p + q) / 2).log()
            values = ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2
        case "tvd":
            values = (p - q).abs().sum(-1) / 2
        case _:
            difference = student - teacher
            values = (difference - difference.mean(-1, keepdim=True)).square().mean(-1) / temperature**2
    return float(temperature**2 * values.mean())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd", "mse"])
def test_losses_over_classes_are_the_dense_formulas(name: str, temperature: float) -> None:
    config = LossConfig(terms=(LossTermConfig(divergence=name),), temperature=temperature)
    teacher, student = logits(1), logits(2)
    assert loss_of(teacher, student, config) == pytest.approx(
        dense(name, teacher, student, temperature), abs=2e-6
    )
    assert abs(loss_of(teacher, teacher + 3, config)) < 1e-6


def test_hard_and_soft_labels_add_up() -> None:
    config = LossConfig(terms=(LossTermConfig(weight=0.7),), hard_weight=0.3, temperature=3.0)
    teacher, student = logits(1), logits(2)
    labels = torch.tensor([number % 4 for number in range(ROWS)])
    hard = torch.nn.functional.cross_entropy(student, labels).item()
    wanted = 0.7 * dense("forward_kl", teacher, student, 3.0) + 0.3 * hard
    assert loss_of(teacher, student, config) == pytest.approx(wanted, abs=2e-6)


def test_labels_are_names_or_numbers_of_the_students_classes() -> None:
    assert [CLASSES.index(each) for each in ("c", 3, 0)] == [2, 3, 0]
    reversed_ = Classes.settle((), NAMES[::-1], {"": NAMES})
    assert reversed_.index("a") == 3
    with pytest.raises(KeyError, match="number the classes differently"):
        reversed_.index(0)
    assert Classes.settle(NAMES, NAMES[::-1], {"": NAMES}).index(0) == 3


@pytest.mark.parametrize(
    ("label", "words"), [("e", 'is "e", which is no class'), (4, "is 4, which is no class")]
)
def test_a_label_that_is_no_class_is_refused_with_file_and_row(label: Label, words: str) -> None:
    with pytest.raises(StillhouseError, match=r"rows.jsonl, row 5, field label: ") as caught:
        CLASSES.check([example("a"), example(label, 5)])
    assert words in str(caught.value)


def test_other_classes_are_refused_by_name() -> None:
    with pytest.raises(StillhouseError, match=r"teachers\[1\]: the classes of teacher second have \"e\""):
        Classes.settle((), NAMES, {"first": NAMES[::-1], "second": ("a", "b", "c", "e")})
    with pytest.raises(StillhouseError, match=r"data\.classes: is required"):
        Classes.settle((), (), {"": ()})


def test_metrics_are_their_definitions() -> None:
    rng = np.random.default_rng(3)
    probs, labels = rng.dirichlet(np.ones(4), size=200), rng.integers(0, 3, 200)
    predicted, confidence = probs.argmax(1), probs.max(1)
    scores_of_rows = class_scores(predicted, confidence, labels, 4)
    found = {name: each.value for name, each in scores_of_rows.items()}
    assert {len(each.sums) for each in scores_of_rows.values()} == {200}
    assert f1(predicted, labels, 4) == pytest.approx(found["f1"], rel=1e-12)
    assert found["accuracy"] == pytest.approx((predicted == labels).mean())
    scores = []
    for each in range(4):
        precision = (labels[predicted == each] == each).mean() if (predicted == each).any() else 0.0
        recall = (predicted[labels == each] == each).mean() if (labels == each).any() else 0.0
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    assert found["f1"] == pytest.approx(np.mean(scores))
    edges = np.linspace(0, 1, 16)
    ece = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            ece += inside.mean() * abs((predicted == labels)[inside].mean() - confidence[inside].mean())
    assert found["ece"] == pytest.approx(ece)
