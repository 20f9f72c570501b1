"""The fused objective equals the plain one in value and gradients, for every loss, chunk size and edge case."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.loss.fused import CPU_CHUNK_ROWS, OutputLayer, fused_objective
from stillhouse.student_trainer.train.loss.objective import ObjectiveSum, Positions, objective
from stillhouse.student_trainer.train.loss.policy_gradient import SampledTokens
from stillhouse.student_trainer.train.loss.sparse import DenseTargets, SparseTargets
from stillhouse.student_trainer.train.loss.workspace import Workspace
from tests.student_trainer.train.loss.dense_reference import random_logits, targets_of

N, H, V, K = 11, 6, 23, 5

NAMES = (
    *("forward_kl", "reverse_kl", "jsd", "jsd_normalised", "tvd", "skew_kl", "skew_reverse_kl"),
    *("alpha_beta", "adaptive_kl", "mse"),
)


def _losses() -> dict[str, LossConfig]:
    alone = {name: LossConfig(terms=(LossTermConfig(divergence=name),)) for name in NAMES}
    mixed = LossConfig(
        terms=(LossTermConfig(weight=0.7), LossTermConfig(divergence="tvd", weight=0.2)), hard_weight=0.3
    )
    sampled = LossTermConfig(divergence="reverse_kl", estimator="policy_gradient")
    return {
        **alone,
        "mixed": mixed,
        "mixed, exact": replace(mixed, temperature=2.0),
        "mixed, conditional": replace(mixed, temperature=2.0, temperature_mode="conditional"),
        "text alone": LossConfig(terms=(LossTermConfig(weight=0),), hard_weight=1.0),
        "policy gradient": LossConfig(terms=(sampled,)),
        "weighted": LossConfig(terms=(LossTermConfig(token_weighting="teacher_entropy"),)),
    }


LOSSES = _losses()


def _layer(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> OutputLayer:
    return OutputLayer(
        weight=random_logits(V, H, seed=1, dtype=dtype).requires_grad_(),
        bias=random_logits(V, seed=2, dtype=dtype).requires_grad_() if bias else None,
    )


def _positions(targets: SparseTargets | DenseTargets | None, dtype: torch.dtype = torch.float64) -> Positions:
    generator = torch.Generator().manual_seed(3)
    return Positions(
        target_ids=torch.randint(0, V, (1, N), generator=generator),
        weights=torch.rand(1, N, generator=generator, dtype=dtype) + 0.5,
        targets=targets,
        sampled=SampledTokens(
            teacher_logprobs=-torch.rand(1, N, generator=generator, dtype=dtype),
            behaviour_logprobs=-torch.rand(1, N, generator=generator, dtype=dtype),
            max_importance_weight=2.0,
        ),
        token_factors={"teacher_entropy": torch.rand(1, N, generator=generator, dtype=dtype)},
    )


def _gradients(total: ObjectiveSum, *leaves: Tensor | None) -> list[Tensor]:
    return list(
        torch.autograd.grad(
            2 * total.loss_sum, [each for each in leaves if each is not None], materialize_grads=True
        )
    )


def _compare(
    positions: Positions, config: LossConfig, *, chunk_rows: int = 4, vocab_size: int | None = None
) -> None:
    layer = _layer()
    hidden = random_logits(N, H, seed=4, dtype=torch.float64).requires_grad_()
    fused = fused_objective(
        hidden, layer, positions, config, vocab_size=vocab_size, chunk_logits=chunk_rows * V
    )
    found = _gradients(fused, hidden, layer.weight, layer.bias)
    plain = objective(
        torch.nn.functional.linear(hidden, layer.weight, layer.bias).unsqueeze(0),
        positions.target_ids,
        positions.targets,
        positions.weights,
        config,
        vocab_size=vocab_size,
        sampled=positions.sampled,
        token_factors=positions.token_factors,
    )
    expected = _gradients(plain, hidden, layer.weight, layer.bias)
    torch.testing.assert_close(fused.loss_sum, plain.loss_sum, rtol=1e-9, atol=1e-12)
    assert fused.parts.keys() == plain.parts.keys()
    for name in fused.parts:
        torch.testing.assert_close(fused.parts[name], plain.parts[name], rtol=1e-9, atol=1e-12, msg=name)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def _teacher(**options: int | float) -> SparseTargets:
    return targets_of(random_logits(1, N, V, seed=5), K, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOSSES)
def test_fused_equals_plain(name: str) -> None:
    config = LOSSES[name]
    _compare(_positions(_teacher(temperature=config.temperature)), config)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "mixed, exact", "mse"])
def test_fused_equals_plain_over_dense_targets(name: str) -> None:
    logprobs = random_logits(1, N, V + 2, seed=5).log_softmax(-1)
    _compare(_positions(DenseTargets(logprobs=logprobs)), LOSSES[name], vocab_size=V - 3)


@pytest.mark.parametrize("name", ["mixed", "mixed, exact", "reverse_kl"])
@pytest.mark.parametrize("chunk_rows", [1, N, 100])
def test_pads_out_of_range_ids_and_chunk_sizes_change_nothing(name: str, chunk_rows: int) -> None:
    targets = _teacher(temperature=LOSSES[name].temperature, pads=2)
    targets.token_ids[0, 2] = -1
    targets.token_ids[0, 3, 0] = V + 5
    _compare(_positions(targets), LOSSES[name], chunk_rows=chunk_rows, vocab_size=V - 4)


def test_no_teacher_is_needed_for_the_text_alone() -> None:
    _compare(_positions(None), LOSSES["text alone"])


@pytest.mark.parametrize("name", ["mixed", "mixed, exact", "adaptive_kl"])
def test_whole_vocabulary_as_kept_tokens(name: str) -> None:
    targets = targets_of(random_logits(1, N, V, seed=5), V, temperature=LOSSES[name].temperature)
    _compare(_positions(targets), LOSSES[name])


@pytest.mark.parametrize("name", [*NAMES, "mixed, exact", "mixed, conditional"])
def test_extreme_students_have_finite_gradients(name: str) -> None:
    """One-hot students, students that forbid tokens, masked NaN: all finite, and equal to the plain loss."""
    config = LOSSES[name]
    layer = OutputLayer(weight=torch.eye(V).requires_grad_())
    hidden = random_logits(1, N, V, seed=6)[0]
    hidden[0], hidden[0, 3] = -1e4, 1e4
    hidden[1], hidden[1, 3] = -math.inf, 0.0
    hidden[2] *= 1e4
    hidden[4] = torch.nan
    teacher = _teacher(temperature=config.temperature)
    positions = _positions(teacher, torch.float32)
    positions.weights[0, 4] = 0.0
    # 0 x -inf inside a matmul would be NaN, so the logits are written directly.
    leaf = hidden.clone().requires_grad_()
    plain = objective(
        leaf.unsqueeze(0), positions.target_ids, teacher, positions.weights, config, vocab_size=V
    )
    (expected,) = torch.autograd.grad(plain.loss_sum, leaf)
    hidden[1] = 0.0
    leaf = hidden.clone().requires_grad_()
    fused = fused_objective(leaf, layer, positions, config, vocab_size=V, chunk_logits=3 * V)
    (found,) = torch.autograd.grad(fused.loss_sum, leaf)
    assert torch.isfinite(found).all()
    assert torch.isfinite(expected).all()
    keep = [0, *range(2, N)]
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_a_frozen_layer_gets_no_gradient_and_none_is_computed_without() -> None:
    positions = _positions(_teacher())
    layer = OutputLayer(weight=random_logits(V, H, seed=1, dtype=torch.float64))
    hidden = random_logits(N, H, seed=4, dtype=torch.float64).requires_grad_()
    fused = fused_objective(hidden, layer, positions, LOSSES["mixed"])
    fused.loss_sum.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        value = fused_objective(hidden, layer, positions, LOSSES["mixed"]).loss_sum
    assert not value.requires_grad
    torch.testing.assert_close(value, fused.loss_sum.detach())


def test_autocast_sets_the_dtype_of_the_matmul_alone() -> None:
    positions = _positions(_teacher(), torch.float32)
    layer = _layer(torch.float32)
    hidden = random_logits(N, H, seed=4).requires_grad_()
    plain = fused_objective(hidden, layer, positions, LOSSES["mixed"])
    expected = _gradients(plain, hidden, layer.weight, layer.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = fused_objective(hidden, layer, positions, LOSSES["mixed"], chunk_logits=4 * V)
    found = _gradients(rounded, hidden, layer.weight, layer.bias)
    assert rounded.loss_sum.dtype == torch.float32
    assert rounded.loss_sum.item() == pytest.approx(plain.loss_sum.item(), rel=0.02)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("chunk_rows", [1, 4, N])
def test_weights_of_half_precision_get_gradients_of_their_type(chunk_rows: int) -> None:
    positions = _positions(_teacher(), torch.float32)
    layer = _layer(torch.bfloat16)
    # Small logits: a processor with half-precision matmuls rounds them.
    hidden = random_logits(N, H, seed=4, scale=0.3, dtype=torch.bfloat16).requires_grad_()
    leaves = (hidden, layer.weight, layer.bias)
    fused = fused_objective(hidden, layer, positions, LOSSES["mixed"], chunk_logits=chunk_rows * V)
    found = _gradients(fused, *leaves)
    wide = [each.detach().double().requires_grad_() for each in leaves if each is not None]
    plain = fused_objective(wide[0], OutputLayer(weight=wide[1], bias=wide[2]), positions, LOSSES["mixed"])
    expected = _gradients(plain, *wide)
    assert fused.loss_sum.dtype == torch.float32
    assert fused.loss_sum.item() == pytest.approx(plain.loss_sum.item(), rel=0.02)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_memory_of_earlier_calls_changes_no_value_and_no_gradient_handed_out(dtype: torch.dtype) -> None:
    """Calls of several sizes, with one workspace and with a new one each; gradients are read after all calls."""
    positions = _positions(_teacher(), torch.promote_types(dtype, torch.float32))
    layer = _layer(dtype)

    def gradients(workspace: Workspace | None) -> list[list[Tensor]]:
        found = []
        for num_rows, chunk_rows in ((N - 2, 2), (N, 4), (1, 1)):
            hidden = random_logits(N, H, seed=num_rows, dtype=dtype)[:num_rows].requires_grad_()
            total = fused_objective(
                hidden,
                layer,
                positions.rows(slice(num_rows)),
                LOSSES["mixed"],
                chunk_logits=chunk_rows * V,
                workspace=workspace,
            )
            found.append([total.loss_sum.detach(), *_gradients(total, hidden, layer.weight, layer.bias)])
        return found

    for kept, fresh in zip(gradients(Workspace()), gradients(None), strict=True):
        for one, other in zip(kept, fresh, strict=True):
            assert torch.equal(one, other)


def test_a_workspace_keeps_memory_by_name_and_type_and_grows() -> None:
    workspace, cpu = Workspace(), torch.device("cpu")
    first = workspace.empty("logits", (4, 10), torch.float32, cpu)
    assert workspace.empty("logits", (3, 5), torch.float32, cpu).data_ptr() == first.data_ptr()
    assert workspace.empty("weight", (4, 10), torch.float32, cpu).data_ptr() != first.data_ptr()
    larger = workspace.empty("logits", (5, 10), torch.float32, cpu)
    assert larger.shape == (5, 10)
    assert workspace.empty("logits", (4, 10), torch.float32, cpu).data_ptr() == larger.data_ptr()
    assert workspace.empty("logits", (2, 0), torch.bfloat16, cpu).dtype == torch.bfloat16


def test_chunks_on_a_cpu_have_a_limited_number_of_positions() -> None:
    num_rows, workspace = 2 * CPU_CHUNK_ROWS + 3, Workspace()
    positions = Positions(
        target_ids=torch.arange(num_rows).unsqueeze(0) % V, weights=torch.ones(1, num_rows), targets=None
    )
    hidden, layer = random_logits(num_rows, H, seed=4, dtype=torch.float32), _layer(torch.float32)
    total = fused_objective(hidden, layer, positions, LOSSES["text alone"], workspace=workspace)
    logits = workspace.empty("logits", (1, V), torch.float32, torch.device("cpu"))
    assert logits.untyped_storage().nbytes() == CPU_CHUNK_ROWS * V * logits.element_size()
    expected = fused_objective(hidden, layer, positions, LOSSES["text alone"], chunk_logits=num_rows * V)
    torch.testing.assert_close(total.loss_sum, expected.loss_sum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_matmul_dtype_is_used_whatever_autocast_and_weights_have(dtype: torch.dtype) -> None:
    positions, wide = _positions(_teacher(), torch.float32), _layer(torch.float32)
    hidden = random_logits(N, H, seed=4, dtype=torch.float32)
    rounded = OutputLayer(weight=wide.weight.to(dtype), bias=wide.bias)
    expected = fused_objective(hidden.to(dtype), rounded, positions, LOSSES["mixed"])
    plain = fused_objective(hidden, wide, positions, LOSSES["mixed"], matmul_dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = fused_objective(hidden, wide, positions, LOSSES["mixed"], matmul_dtype=dtype)
    assert torch.equal(plain.loss_sum, expected.loss_sum)
    assert torch.equal(automatic.loss_sum, expected.loss_sum)
