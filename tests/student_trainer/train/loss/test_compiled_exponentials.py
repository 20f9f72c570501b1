"""Compiled exponentials equal their formula, and the fused objective over them equals the plain one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.protos.tensors.exponentials_numba import exponentials, shares
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.loss.fused import OutputLayer, fused_objective
from stillhouse.student_trainer.train.loss.logit_chunk import COMPILED_VOCAB
from stillhouse.student_trainer.train.loss.objective import Positions, objective
from tests.student_trainer.train.loss.dense_reference import random_logits, targets_of

R, N, H, V, K = 7, 12, 16, 2500, 9
DTYPES = {"float32": 2e-6, "bfloat16": 5e-3}
MIXED = LossConfig(
    terms=(LossTermConfig(weight=0.7), LossTermConfig(divergence="reverse_kl", weight=0.2)), hard_weight=0.3
)


def _rows() -> Tensor:
    """Usual logits; then a row that climbs by 150, one that falls, one with minus infinities, and one of nothing else."""
    logits = 5 * torch.randn(R, V, generator=torch.Generator().manual_seed(0))
    logits[1] += torch.linspace(-80, 70, V)
    logits[2] -= torch.linspace(-80, 70, V)
    logits[3, :1100] = -torch.inf
    logits[4] = -torch.inf
    return logits


def _array(logits: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = (
        logits.view(torch.uint16) if logits.dtype == torch.bfloat16 else logits
    ).numpy()
    return array


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_rows_become_exponentials_and_their_sums(dtype: str, temperature: float) -> None:
    logits = _rows().to(getattr(torch, dtype))
    wide = logits.double() / temperature
    references, sums = np.empty(R, np.float32), np.empty(R)
    exponentials(
        _array(logits),
        slice(0, R),
        scale=1 / temperature,
        keep=True,
        references_R=references,
        sums_R=sums,
    )
    found = np.log(sums[sums > 0]) + references[sums > 0] / temperature
    np.testing.assert_allclose(found, wide.logsumexp(-1)[torch.from_numpy(sums > 0)].numpy(), atol=1e-5)
    assert (sums == 0).tolist() == [row == 4 for row in range(R)]
    shift = torch.from_numpy(np.nan_to_num(references, neginf=0.0)).double().unsqueeze(-1) / temperature
    expected = (wide - shift).exp()
    torch.testing.assert_close(logits.double(), expected, rtol=DTYPES[dtype] * 8, atol=1e-37)
    assert float(expected.max()) < math.exp(40)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1030, V - 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_has_no_finite_sum(dtype: str, place: int, value: float) -> None:
    logits = torch.randn(2, V).to(getattr(torch, dtype))
    logits[1, place] = value
    references, sums = np.empty(2, np.float32), np.empty(2)
    exponentials(_array(logits), slice(0, 2), scale=1.0, keep=True, references_R=references, sums_R=sums)
    assert np.isfinite(sums).tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shares_of_two_temperatures_equal_their_formula(dtype: str) -> None:
    logits = (3 * torch.randn(R, V, generator=torch.Generator().manual_seed(1))).to(getattr(torch, dtype))
    wide = logits.double()
    rest, total = (wide / 2).logsumexp(-1), wide.logsumexp(-1)
    by_row = [rest, torch.full_like(rest, 0.6), total, torch.full_like(rest, 0.4)]
    shares(_array(logits), [each.float().numpy() for each in by_row], slice(0, R), scale=0.5)
    expected = 0.6 * (wide / 2 - rest.unsqueeze(-1)).exp() - 0.4 * (wide - total.unsqueeze(-1)).exp()
    torch.testing.assert_close(logits.double(), expected, rtol=DTYPES[dtype], atol=2e-8)


def _fused(
    dtype: torch.dtype,
    config: LossConfig,
    *,
    expected: float = 1.0,
    arriving: float = 1.0,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Loss and gradients, by the fused objective or for float64 by the plain one."""
    hidden = random_logits(N, H, seed=4, dtype=torch.float64).to(torch.bfloat16).to(dtype)
    weight = (scale * random_logits(V, H, seed=1, dtype=torch.float64)).to(torch.bfloat16).to(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = targets_of(random_logits(1, N, V, seed=5), K, temperature=config.temperature)
    positions = Positions(
        target_ids=torch.randint(0, V, (1, N), generator=torch.Generator().manual_seed(3)),
        weights=torch.ones(1, N, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        targets=targets,
    )
    if dtype == torch.float64:
        summed = objective(
            (hidden @ weight.T).unsqueeze(0), positions.target_ids, targets, positions.weights, config
        )
    else:
        layer = OutputLayer(weight=weight)
        summed = fused_objective(hidden, layer, positions, config, chunk_logits=5 * V, upstream=expected)
    gradients = torch.autograd.grad(summed.loss_sum * arriving, [hidden, weight])
    return (summed.loss_sum.detach(), *gradients)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 25.0])
def test_fused_over_compiled_exponentials_equals_plain(
    dtype: str, close: float, temperature: float, scale: float
) -> None:
    assert V >= COMPILED_VOCAB
    config = replace(MIXED, temperature=temperature)
    plain = _fused(torch.float64, config, scale=scale)
    found = _fused(getattr(torch, dtype), config, scale=scale)
    for one, other in zip(found, plain, strict=True):
        difference = (one.double() - other).norm() / other.norm()
        assert float(difference) < close


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_exponentials_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from stillhouse.student_trainer.train.loss import logit_chunk

    monkeypatch.setattr(logit_chunk, "BLOCK_LOGITS", V)
    losses = []
    for count in (1, 3):
        torch.set_num_threads(count)
        losses.append(_fused(torch.float32, MIXED)[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("expected", [1.0, 0.125, 1 / 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_whatever_upstream_was_expected(expected: float, dtype: torch.dtype) -> None:
    plain = _fused(dtype, MIXED, arriving=0.125)
    found = _fused(dtype, MIXED, arriving=0.125, expected=expected)
    for one, other in zip(found, plain, strict=True):
        difference = (one.double() - other.double()).norm() / other.double().norm()
        assert float(difference) < (1e-6 if dtype == torch.float32 else 1e-2)
