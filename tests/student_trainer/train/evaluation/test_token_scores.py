"""Scores of positions are their definitions on dense distributions, and bounds of these on the top-k and a tail."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stillhouse.protos.evaluation.calibration import bin_sums, ece_of_sums
from stillhouse.student_trainer.train.evaluation.token_scores import token_scores
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.loss.sparse import PAD_ID, DenseTargets, SparseTargets, Targets

N, V, K = 200, 50, 8
NAMED = ("acceptance", "overlap", "ece")


def logits(seed: int) -> Tensor:
    return torch.randn(1, N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


STUDENT, TEACHER = logits(0), logits(1) + logits(0)
TEXT = torch.randint(V, (1, N), generator=torch.Generator().manual_seed(2))


def scores(targets: Targets | None) -> dict[str, np.ndarray]:
    here = Positions(target_ids=TEXT, weights=torch.ones(1, N), targets=targets)
    found = token_scores(STUDENT, here, vocab_size=V, named=NAMED)
    return {name: each.double().numpy() for name, each in found.items()}


def sparse() -> SparseTargets:
    top = TEACHER.log_softmax(-1).topk(K, -1)
    tail = torch.log1p(-top.values.exp().sum(-1))
    return SparseTargets(token_ids=top.indices, logprobs=top.values, log_tail=tail)


def test_scores_are_their_definitions_on_dense_distributions() -> None:
    found = scores(DenseTargets(logprobs=TEACHER.log_softmax(-1)))
    p, q = TEACHER.softmax(-1)[0].numpy(), STUDENT.softmax(-1)[0].numpy()
    text = TEXT[0].numpy()
    np.testing.assert_allclose(found["cross_entropy"], -np.log(q[np.arange(N), text]), rtol=1e-6)
    np.testing.assert_allclose(found["kl"], (p * np.log(p / q)).sum(-1), rtol=1e-6)
    # Speculative decoding keeps min(1, p / q) of a token that the student draws.
    np.testing.assert_allclose(found["acceptance"], (q * np.minimum(1, p / q)).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(found["agreement"], p.argmax(-1) == q.argmax(-1))
    np.testing.assert_allclose(found["confidence"], q.max(-1), rtol=1e-6)
    np.testing.assert_array_equal(found["correct"], q.argmax(-1) == text)
    ece = ece_of_sums(bin_sums(found["confidence"], found["correct"] > 0))
    assert abs(ece - ece_of_sums(bin_sums(q.max(-1), q.argmax(-1) == text))) < 1e-6


def test_the_tail_as_one_token_bounds_divergence_and_acceptance() -> None:
    exact, found = scores(DenseTargets(logprobs=TEACHER.log_softmax(-1))), scores(sparse())
    assert (found["kl"] <= exact["kl"] + 1e-9).all()
    assert (found["acceptance"] >= exact["acceptance"] - 1e-9).all()
    assert found["acceptance"].mean() - exact["acceptance"].mean() < 0.1


def test_overlap_counts_the_teachers_tokens_and_no_padding() -> None:
    targets = sparse()
    expected = [
        len(set(theirs) & set(ours)) / K
        for theirs, ours in zip(
            targets.token_ids[0].tolist(), STUDENT.topk(K, -1).indices[0].tolist(), strict=True
        )
    ]
    np.testing.assert_allclose(scores(targets)["overlap"], expected)
    targets.token_ids[:, :, K // 2 :] = PAD_ID
    half = [
        len(set(theirs[: K // 2]) & set(ours)) / (K // 2)
        for theirs, ours in zip(
            targets.token_ids[0].tolist(), STUDENT.topk(K // 2, -1).indices[0].tolist(), strict=True
        )
    ]
    np.testing.assert_allclose(scores(targets)["overlap"], half)


def test_text_alone_has_no_teachers_scores() -> None:
    assert set(scores(None)) == {"cross_entropy", "confidence", "correct"}
