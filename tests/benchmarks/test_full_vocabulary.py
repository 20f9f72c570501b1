"""The benchmark's own gradient over the complete vocabulary equals that of the product's loss."""

from __future__ import annotations

import pytest
import torch

from benchmarks.distillation.full_vocabulary import full_gradient_loss, has_full_gradient
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.loss.fused import OutputLayer, fused_objective
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.loss.sparse import DenseTargets


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    "divergence", ["forward_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl", "alpha_beta"]
)
def test_full_gradients_equal_those_of_the_products_loss(divergence: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (40, 30))
    logprobs = (3 * torch.randn(40, 30, generator=generator, dtype=torch.float64)).log_softmax(-1)
    loss = LossConfig(terms=(LossTermConfig(divergence=divergence, weight=0.7),), temperature=temperature)
    assert has_full_gradient(loss)
    leaves = [each.requires_grad_() for each in (hidden, weight)]
    positions = Positions(
        target_ids=torch.zeros(1, 40, dtype=torch.long),
        weights=torch.ones(1, 40, dtype=torch.float64),
        targets=DenseTargets(logprobs=logprobs.unsqueeze(0)),
    )
    expected = fused_objective(hidden, OutputLayer(weight=weight), positions, loss).loss_sum
    found = full_gradient_loss(hidden, weight, (logprobs / temperature).log_softmax(-1), loss)
    for ours, products in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, products, rtol=1e-6, atol=1e-8)


def test_losses_without_a_formula_are_left_to_the_product() -> None:
    assert not has_full_gradient(LossConfig(terms=(LossTermConfig(divergence="reverse_kl"),)))
    assert not has_full_gradient(LossConfig(terms=(LossTermConfig(),), hard_weight=0.5))
