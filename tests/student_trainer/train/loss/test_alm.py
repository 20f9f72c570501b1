"""Approximate likelihood matching as mathematics: against a dense float64 reference, tokenkit's formula, limits and edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stillhouse.student_trainer.config.rules.cross_tokenizer import OF_CHUNKS
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.loss.alm import (
    EPSILON,
    ChunkTargets,
    binary,
    chunk_divergence,
    chunk_objective,
    log1mexp,
)
from stillhouse.student_trainer.train.loss.fused import OutputLayer
from stillhouse.student_trainer.train.loss.text_logprobs import text_logprobs, text_logprobs_of

N = 9
CHUNK_OF = [0, 0, -1, 1, 2, 2, 2, -1, 3]
ONES = torch.ones(1, N)


def _text(seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(1, N, generator=generator, dtype=torch.float64)


def _chunks(seed: int, weights: list[float] | None = None) -> ChunkTargets:
    generator = torch.Generator().manual_seed(seed)
    return ChunkTargets(
        chunk_of=torch.tensor([CHUNK_OF]),
        teacher_logprobs=-6 * torch.rand(4, generator=generator, dtype=torch.float64),
        weights=torch.tensor(weights or [1.0] * 4, dtype=torch.float64),
    )


def _config(
    divergence: str = "forward_kl", temperature: float = 100.0, hard_weight: float = 0.0
) -> LossConfig:
    return LossConfig(
        terms=(LossTermConfig(divergence=divergence),),
        foreign_tokenizer="alm",
        chunk_temperature=temperature,
        hard_weight=hard_weight,
    )


def _sums(text: Tensor) -> list[float]:
    return [sum(float(text[0, i]) for i in range(N) if CHUNK_OF[i] == c) for c in range(4)]


DENSE = {
    "forward_kl": lambda p, q: p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
    "reverse_kl": lambda p, q: q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
    "tvd": lambda p, q: abs(p - q),
}


@pytest.mark.parametrize("divergence", sorted(DENSE))
@pytest.mark.parametrize("temperature", [1.0, 5.0, 100.0])
def test_the_loss_is_the_divergence_of_two_probabilities(divergence: str, temperature: float) -> None:
    text, chunks = _text(1), _chunks(2, [1.0, 0.5, 2.0, 0.25])
    expected = 0.0
    for own, theirs, weight in zip(
        _sums(text), chunks.teacher_logprobs.tolist(), chunks.weights.tolist(), strict=True
    ):
        p, q = (math.exp(each / temperature - EPSILON) for each in (theirs, own))
        expected += weight * DENSE[divergence](p, q)
    found = chunk_objective(text, ONES, chunks, _config(divergence, temperature))
    assert found.loss_sum.item() == pytest.approx(expected, rel=1e-9)
    assert found.parts[f"alm_{divergence}"].item() == pytest.approx(expected, rel=1e-9)


def _tokenkit(kind: str, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """tokenkit (github.com/bminixhofer/tokenkit), training/losses.py, compute_alm_loss, each chunk; written anew.

    Its temperature is binarization_temp, 100 in its configurations.
    """
    true, predicted = teacher / temperature - 1e-6, student / temperature - 1e-6
    not_true, not_predicted = (torch.log(-torch.expm1(each)) for each in (true, predicted))
    if kind == "binary_ce":
        return -(true.exp() * predicted + -torch.expm1(true) * not_predicted)
    if kind == "reverse_binary_kl":
        return predicted.exp() * (predicted - true) + -torch.expm1(predicted) * (not_predicted - not_true)
    return (true.exp() - predicted.exp()).abs()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("forward_kl", "binary_ce"), ("reverse_kl", "reverse_binary_kl"), ("tvd", "abs_exp")],
)
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_the_loss_is_that_of_tokenkit(ours: str, theirs: str, temperature: float) -> None:
    """binary_ce lacks the teacher's entropy, which no gradient sees: so our forward KL is 0 where both sides agree.

    tokenkit divides by the number of chunks of a batch; a step of ours by those of the whole step.
    """
    chunks = _chunks(5)
    student = -6 * torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    student.requires_grad_()
    found = chunk_divergence(ours, chunks.teacher_logprobs, student, temperature=temperature)
    expected = _tokenkit(theirs, chunks.teacher_logprobs, student, temperature)
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)
    entropy = _tokenkit("binary_ce", chunks.teacher_logprobs, chunks.teacher_logprobs, temperature)
    constant = entropy if ours == "forward_kl" else torch.zeros_like(entropy)
    torch.testing.assert_close(found + constant, expected, rtol=1e-8, atol=1e-12)


def test_the_gradient_is_the_closed_form() -> None:
    """d loss / d q = (Q - P) / (1 - Q) / temperature, for each token of the chunk, and 0 for others."""
    text, chunks = _text(3).requires_grad_(), _chunks(4)
    chunk_objective(text, ONES, chunks, _config(temperature=7.0)).loss_sum.backward()
    assert text.grad is not None
    sums = _sums(text.detach())
    for place, chunk in enumerate(CHUNK_OF):
        if chunk < 0:
            assert text.grad[0, place] == 0
            continue
        p = math.exp(chunks.teacher_logprobs[chunk].item() / 7 - EPSILON)
        q = math.exp(sums[chunk] / 7 - EPSILON)
        assert text.grad[0, place].item() == pytest.approx((q - p) / (1 - q) / 7, rel=1e-8)


@pytest.mark.parametrize("divergence", [each for each in OF_CHUNKS if each != "tvd"])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_gradients_are_those_of_differences(divergence: str, temperature: float) -> None:
    chunks = _chunks(8)
    config = _config(divergence, temperature, hard_weight=0.3)
    assert torch.autograd.gradcheck(
        lambda text: chunk_objective(text, ONES, chunks, config).loss_sum, (_text(7).requires_grad_(),)
    )


@pytest.mark.parametrize("divergence", OF_CHUNKS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 100.0])
def test_a_student_that_agrees_has_loss_zero(divergence: str, temperature: float) -> None:
    text = _text(9).requires_grad_()
    chunks = ChunkTargets(
        chunk_of=torch.tensor([CHUNK_OF]),
        teacher_logprobs=torch.tensor(_sums(text.detach()), dtype=torch.float64),
        weights=torch.ones(4, dtype=torch.float64),
    )
    loss = chunk_objective(text, ONES, chunks, _config(divergence, temperature)).loss_sum
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert text.grad is not None
    assert text.grad.abs().max() < 1e-8
    worse = chunk_objective(text - 0.5, ONES, chunks, _config(divergence, temperature)).loss_sum
    assert worse.item() > 0


def test_masking_a_chunk_equals_deleting_it() -> None:
    text, chunks = _text(10), _chunks(11)
    without = [chunk if chunk < 2 else chunk - 1 if chunk > 2 else -1 for chunk in CHUNK_OF]
    keep = torch.tensor([0, 1, 3])
    deleted = ChunkTargets(
        chunk_of=torch.tensor([without]),
        teacher_logprobs=chunks.teacher_logprobs[keep],
        weights=chunks.weights[keep],
    )
    masked = ChunkTargets(
        chunk_of=chunks.chunk_of,
        teacher_logprobs=chunks.teacher_logprobs,
        weights=torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64),
    )
    config = _config()
    assert chunk_objective(text, ONES, masked, config).loss_sum == pytest.approx(
        chunk_objective(text, ONES, deleted, config).loss_sum.item(), rel=1e-12
    )
    spoilt = text.clone()
    spoilt[0, [place for place, chunk in enumerate(without) if chunk < 0]] = math.nan
    spoilt.requires_grad_()
    loss = chunk_objective(spoilt, ONES, deleted, config).loss_sum
    loss.backward()
    assert spoilt.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(spoilt.grad).all()


def test_chunks_of_one_token_are_the_binary_form_of_each_token() -> None:
    """Equals ALM with one tokenizer on both sides."""
    text = _text(12)
    teacher = _text(13)[0]
    chunks = ChunkTargets(
        chunk_of=torch.arange(N).unsqueeze(0),
        teacher_logprobs=teacher,
        weights=torch.ones(N, dtype=torch.float64),
    )
    found = chunk_objective(text, ONES, chunks, _config(temperature=1.0)).loss_sum.item()
    expected = sum(
        DENSE["forward_kl"](math.exp(p - EPSILON), math.exp(q - EPSILON))
        for p, q in zip(teacher.tolist(), text[0].tolist(), strict=True)
    )
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("divergence", OF_CHUNKS)
@pytest.mark.parametrize("pair", [(0.0, -3.0), (-3.0, 0.0), (-math.inf, -3.0), (-3.0, -math.inf), (0.0, 0.0)])
def test_edges_are_finite(divergence: str, pair: tuple[float, float]) -> None:
    """Certain and impossible chunks, on either side; a sum above 0 through rounding is certain."""
    text = torch.full((1, 2), pair[1] / 2).requires_grad_()
    chunks = ChunkTargets(
        chunk_of=torch.zeros(1, 2, dtype=torch.int64),
        teacher_logprobs=torch.tensor([pair[0] + 1e-7], dtype=torch.float64),
        weights=torch.ones(1, dtype=torch.float64),
    )
    loss = chunk_objective(text, torch.ones(1, 2), chunks, _config(divergence)).loss_sum
    loss.backward()
    assert torch.isfinite(loss)
    assert loss >= -1e-12
    assert text.grad is not None
    assert torch.isfinite(text.grad).all()


def test_no_chunk_gives_zero_with_a_graph() -> None:
    text = _text(14).requires_grad_()
    chunks = ChunkTargets(
        chunk_of=torch.full((1, N), -1),
        teacher_logprobs=torch.zeros(0, dtype=torch.float64),
        weights=torch.zeros(0, dtype=torch.float64),
    )
    found = chunk_objective(text, ONES, chunks, _config())
    found.loss_sum.backward()
    assert found.loss_sum == 0
    assert found.parts["aligned"] == 0


def test_log1mexp_keeps_its_digits() -> None:
    x = torch.tensor(
        [-1e-12, -1e-6, -0.5, -math.log(2), -1.0, -40.0], dtype=torch.float64, requires_grad=True
    )
    # Each form in the range where it is precise.
    expected = [
        math.log(-math.expm1(each)) if each > -1 else math.log1p(-math.exp(each)) for each in x.tolist()
    ]
    torch.testing.assert_close(log1mexp(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(log1mexp, (x[2:].detach().requires_grad_(),))
    assert torch.isfinite(torch.autograd.grad(log1mexp(x).sum(), x)[0]).all()
    torch.testing.assert_close(
        binary(x.detach(), 3.0).exp().sum(-1), torch.ones(6, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("chunk_logits", [1, 30, 10_000])
def test_text_logprobs_in_chunks_are_those_of_whole_logits(chunk_logits: int) -> None:
    generator = torch.Generator().manual_seed(15)
    hidden = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (1, 7), generator=generator)
    upstream = torch.randn(1, 7, generator=generator, dtype=torch.float64)
    whole = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[0].unsqueeze(-1)).T
    fused = text_logprobs(hidden, OutputLayer(weight=weight), ids, chunk_logits=chunk_logits)
    given = text_logprobs_of((hidden @ weight.T).unsqueeze(0), ids, chunk_logits=chunk_logits)
    expected = torch.autograd.grad((whole * upstream).sum(), (hidden, weight))
    for each in (fused, given):
        torch.testing.assert_close(each, whole)
        torch.testing.assert_close(torch.autograd.grad((each * upstream).sum(), (hidden, weight)), expected)
