"""Logits to distributions against float64 numpy: exact tails, chunks that change nothing, independent samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.distributions import from_logits, normalisation, row_tensors
from stillhouse.teacher_service.distributions.draws import sampled_ids, uniforms
from stillhouse.teacher_service.distributions.from_logits import RowSpec, distributions
from stillhouse.teacher_service.engine import DistributionOptions

V, T = 50, 7
EVERYTHING = DistributionOptions(
    top_k=5, temperatures=(0.5, 1.0, 2.0), num_sampled_tokens=4, seed=9, entropy=True, hidden_states=True
)


def logits(seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(T, V, generator=torch.Generator().manual_seed(seed)) * scale


def target(start: int = 2, query: np.ndarray[tuple[int, int], np.dtype[np.int32]] | None = None) -> RowSpec:
    ids = np.random.default_rng(1).integers(0, V, start + T).astype(np.int32)
    return RowSpec(start=start, sequence=ids, query_token_ids=query)


def identity(rows: Tensor) -> Tensor:
    return rows


def run(
    rows: Tensor, options: DistributionOptions, head: Callable[[Tensor], Tensor] = identity
) -> Distributions:
    return distributions(rows, head, target(), options, vocab_size=V)


def test_every_part_equals_float64() -> None:
    query = np.random.default_rng(2).integers(-1, V, (T, 3)).astype(np.int32)
    rows, asked = logits(), target(query=query)
    got = distributions(rows, identity, asked, EVERYTHING, vocab_size=V)
    logprobs = rows.double().log_softmax(-1).numpy()
    order = np.argsort(-logprobs, axis=1)[:, :5]
    assert np.array_equal(got.token_ids, order)
    assert np.abs(got.logprobs - np.take_along_axis(logprobs, order, 1)).max() < 1e-5
    assert np.abs(got.target_logprobs - logprobs[np.arange(T), asked.sequence[2:]]).max() < 1e-5
    rest = logprobs.copy()
    np.put_along_axis(rest, order, -np.inf, 1)
    assert np.abs(got.log_tail - np.log(np.exp(rest).sum(1))).max() < 1e-5
    assert got.log_partitions is not None
    partitions = np.stack([np.log(np.exp(logprobs / each).sum(1)) for each in (0.5, 1.0, 2.0)], 1)
    assert np.abs(got.log_partitions - partitions).max() < 1e-5
    assert got.entropy is not None
    assert np.abs(got.entropy + (np.exp(logprobs) * logprobs).sum(1)).max() < 1e-5
    assert got.query_logprobs is not None
    wanted = np.where(query < 0, -np.inf, np.take_along_axis(logprobs, query.clip(0), 1))
    assert np.allclose(got.query_logprobs, wanted, atol=1e-5)
    assert got.start == 2


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(logits(), EVERYTHING)
    monkeypatch.setattr(from_logits, "CHUNK_ELEMENTS", 3 * V)
    calls = []

    def head(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows

    parts = run(logits(), EVERYTHING, head)
    assert calls == [3, 3, 1]
    for name in ("token_ids", "logprobs", "log_tail", "log_partitions", "sampled_token_ids", "hidden_states"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


def test_a_tail_far_below_the_precision_of_a_sum_is_exact() -> None:
    rows = torch.full((1, V), -100.0)
    rows[0, 3] = 0.0
    got = distributions(
        rows,
        identity,
        RowSpec(start=1, sequence=np.array([1, 3], np.int32)),
        DistributionOptions(top_k=1),
        vocab_size=V,
    )
    assert got.log_tail[0] == pytest.approx(-100 + np.log(V - 1), rel=1e-6)


def test_all_tokens_leave_no_tail_and_none_leaves_everything() -> None:
    full = run(logits(), DistributionOptions(top_k=256))
    assert full.token_ids.shape == (T, V)
    assert np.isneginf(full.log_tail).all()
    none = run(logits(), DistributionOptions(top_k=0))
    assert none.token_ids.shape == (T, 0)
    assert np.abs(none.log_tail).max() < 1e-6


def test_half_precision_logits_are_normalised_in_float32() -> None:
    rows = logits().bfloat16()
    got = run(rows, DistributionOptions(top_k=V))
    assert np.abs(np.exp(got.logprobs.astype(np.float64)).sum(1) - 1).max() < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits_are_refused_with_their_position(value: float) -> None:
    rows = logits()
    rows[4, 7] = value
    with pytest.raises(StillhouseError, match="position 6 ") as caught:
        run(rows, DistributionOptions(top_k=5))
    assert caught.value.reason == Reason.NON_FINITE


def test_a_sample_depends_on_seed_prefix_position_and_index_alone() -> None:
    base = uniforms(target(), EVERYTHING)
    assert base is not None
    assert base.shape == (T, 4)
    assert ((base >= 0) & (base < 1)).all()
    more = uniforms(target(), replace(EVERYTHING, num_sampled_tokens=9, top_k=1))
    assert more is not None
    assert np.array_equal(more[:, :4], base)
    later = RowSpec(start=5, sequence=target().sequence)
    tail = uniforms(later, EVERYTHING)
    assert tail is not None
    assert np.array_equal(tail, base[3:])
    changed = target().sequence.copy()
    changed[-1] += 1  # predicted by the last row, and not read
    unread = uniforms(RowSpec(start=2, sequence=changed), EVERYTHING)
    other = uniforms(target(), replace(EVERYTHING, seed=-10))
    assert unread is not None
    assert other is not None
    assert np.array_equal(unread, base)
    assert not np.isin(other, base).any()


def test_samples_follow_the_distribution() -> None:
    rows = logits(scale=1.0)[:1]
    got = distributions(
        rows,
        identity,
        RowSpec(start=1, sequence=np.array([1, 3], np.int32)),
        DistributionOptions(top_k=1, num_sampled_tokens=20_000),
        vocab_size=V,
    )
    assert got.sampled_token_ids is not None
    shares = np.bincount(got.sampled_token_ids[0], minlength=V) / 20_000
    probs = rows[0].double().softmax(-1).numpy()
    # Five standard errors of every share.
    assert (np.abs(shares - probs) < 5 * np.sqrt(probs * (1 - probs) / 20_000) + 1e-9).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_samples_of_the_tail_follow_it_at_their_temperature(temperature: float, scale: float) -> None:
    """Also where the tail is far below the top k, whose exponentials would be 0 beside it."""
    rows, top_k, number = logits(scale=scale)[:1], 6, 20_000
    rows[0, rows[0].topk(top_k).indices] += scale
    got = distributions(
        rows,
        identity,
        RowSpec(start=1, sequence=np.array([1, 3], np.int32)),
        DistributionOptions(
            top_k=top_k,
            num_sampled_tokens=number,
            sample_tail=True,
            sample_temperature=temperature,
            sampled_logprobs=True,
        ),
        vocab_size=V,
    )
    assert got.sampled_token_ids is not None
    assert got.sampled_logprobs is not None
    logprobs = rows[0].double().log_softmax(-1)
    np.testing.assert_allclose(got.sampled_logprobs[0], logprobs[got.sampled_token_ids[0]], rtol=1e-5)
    tail = (logprobs / temperature).index_fill(0, torch.from_numpy(got.token_ids[0]).long(), -torch.inf)
    probs = tail.softmax(-1).numpy()
    shares = np.bincount(got.sampled_token_ids[0], minlength=V) / number
    assert (np.abs(shares - probs) <= 5 * np.sqrt(probs * (1 - probs) / number) + 1e-9).all()


@pytest.mark.parametrize("vocab_size", [V, 4099])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 6])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_stratified_samples_miss_their_mean_by_less_than_one(
    vocab_size: int, temperature: float, top_k: int, scale: float
) -> None:
    """In PyTorch and in compiled code, also where the tail is far below the top k; over all places their mean is exact."""
    number, num_rows = 50, 400
    row = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 2
    row[row.topk(top_k).indices] += scale
    rows = row.repeat(num_rows, 1)
    got = distributions(
        rows,
        identity,
        RowSpec(start=1, sequence=(np.arange(num_rows + 1) % V).astype(np.int32)),
        DistributionOptions(
            top_k=top_k,
            num_sampled_tokens=number,
            sample_tail=top_k > 0,
            sample_temperature=temperature,
            stratified_samples=True,
        ),
        vocab_size=vocab_size,
    )
    assert got.sampled_token_ids is not None
    assert (np.diff(got.sampled_token_ids, axis=1) >= 0).all()
    tail = row.double().index_fill(0, torch.from_numpy(got.token_ids[0]).long(), -torch.inf) / temperature
    means = number * tail.softmax(-1).numpy()
    counts = np.stack([np.bincount(each, minlength=vocab_size) for each in got.sampled_token_ids])
    assert np.abs(counts - means).max() < 1.001
    assert not counts[:, got.token_ids[0]].any() or top_k == 0
    # The places differ between rows, since the prefixes do.
    variance = np.mod(means, 1) * (1 - np.mod(means, 1))
    assert (np.abs(counts.mean(0) - means) < 6 * np.sqrt(variance / num_rows) + 5e-3).all()


def test_stratified_samples_depend_on_seed_prefix_and_number() -> None:
    options = replace(EVERYTHING, stratified_samples=True)
    base, independent = uniforms(target(), options), uniforms(target(), EVERYTHING)
    assert base is not None
    assert independent is not None
    np.testing.assert_allclose(4 * base - np.arange(4), independent[:, :1] @ np.ones((1, 4)), atol=1e-12)
    later = uniforms(RowSpec(start=5, sequence=target().sequence), options)
    assert later is not None
    assert np.array_equal(later, base[3:])


def test_without_a_tail_samples_are_of_all_tokens() -> None:
    options = DistributionOptions(top_k=V, num_sampled_tokens=3, sample_tail=True)
    got = run(logits(), options)
    assert got.sampled_token_ids is not None
    assert ((got.sampled_token_ids >= 0) & (got.sampled_token_ids < V)).all()


@pytest.mark.parametrize(("size", "top_k"), [(4099, 64), (1 << 16, 256), (70_001, 100), (4096, 1)])
def test_the_top_k_of_a_folded_vocabulary_is_that_of_the_complete_one(size: int, top_k: int) -> None:
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    rows[1, -top_k // 2 :] += 20  # also the remainder that fills no layer
    values, ids = normalisation.largest(rows, top_k)
    assert torch.equal(values, rows.topk(top_k).values)
    assert torch.equal(values, rows.gather(1, ids))
    assert all(len(set(row)) == top_k for row in ids.tolist())


@pytest.mark.parametrize("vocab_size", [7, 128, 1000])
def test_samples_invert_the_cumulative_distribution_and_skip_impossible_tokens(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 5 * torch.randn(3, vocab_size, generator=generator)
    logits[:, torch.rand(vocab_size, generator=generator) < 0.3] = -torch.inf
    logits[:, 0] = 0
    logits[:, -2:] = -torch.inf
    numbers = np.concatenate([np.random.default_rng(0).random((3, 400)), np.zeros((3, 1))], axis=1)
    numbers = np.concatenate([numbers, np.full((3, 1), 1 - 2.0**-53)], axis=1)
    ids = sampled_ids(logits, torch.from_numpy(numbers)).long()
    probs = logits.double().softmax(-1)
    upper = probs.cumsum(-1).gather(1, ids).numpy()
    mass = probs.gather(1, ids).numpy()
    assert (mass > 0).all()
    assert (numbers < upper + 1e-6).all()
    assert (numbers > upper - mass - 1e-6).all()


@pytest.mark.parametrize(("size", "top_k"), [(2048, 1), (4099, 64), (4096, 128), (70_001, 100)])
@pytest.mark.parametrize("shape", ["random", "equal", "stairs", "steep", "clustered"])
def test_compiled_heads_and_tails_equal_float64(size: int, top_k: int, shape: str) -> None:
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(size)) * 3
    if shape == "equal":
        rows = torch.full_like(rows, -1.25)
    elif shape == "stairs":
        rows = (rows * 2).round()  # ties on both sides of the cut
    elif shape == "steep":
        rows[:, 5 : 5 + top_k] += 60
    elif shape == "clustered":
        rows[:, : 2 * top_k] += 10  # the top k lie in few blocks
    assert normalisation.is_compiled(rows, top_k)
    got = normalisation.normalised(rows, top_k)
    wanted = rows.double().log_softmax(-1)
    ids = got.token_ids.long()
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert torch.equal(rows.gather(1, ids), rows.topk(top_k).values)
    assert (got.logprobs - wanted.gather(1, ids)).abs().max() < 2e-6
    tail = wanted.scatter(1, ids, -torch.inf).logsumexp(-1)
    assert ((got.log_tail - tail).abs() < 1e-6 + 1e-7 * tail.abs()).all()
    partitions = normalisation.log_partitions(rows, got, (1.0, 2.0, 0.5))
    assert partitions is not None
    for column, temperature in zip(partitions.T, (1.0, 2.0, 0.5), strict=True):
        torch.testing.assert_close(column.double(), (wanted / temperature).logsumexp(1), rtol=2e-6, atol=2e-6)
    alone = normalisation.normalised(rows[1:2], top_k)
    assert torch.equal(alone.logprobs, got.logprobs[1:2])
    assert torch.equal(alone.log_tail, got.log_tail[1:2])


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1999, 2047])
def test_compiled_rows_with_non_finite_logits_are_detected(value: float, place: int) -> None:
    rows = torch.randn(3, 2048, generator=torch.Generator().manual_seed(1))
    rows[1, place] = value
    assert normalisation.is_compiled(rows, 8)
    assert normalisation.normalised(rows, 8).finite.tolist() == [True, False, True]


def test_equal_logits_come_in_the_order_of_their_ids() -> None:
    rows = torch.zeros(1, 4096)
    rows[0, 70] = 1.0
    assert normalisation.normalised(rows, 4).token_ids.tolist() == [[70, 0, 1, 2]]


@pytest.mark.parametrize("stratified", [False, True])
def test_compiled_rows_are_those_of_a_devices_arithmetic(stratified: bool) -> None:
    size = 4099
    rows = torch.randn(6, size, generator=torch.Generator().manual_seed(3)) * 4
    rows[2, 7], rows[4, -1] = torch.nan, torch.inf
    plain = rows.t().contiguous().t()  # rows that do not lie together are not compiled
    options = replace(EVERYTHING, top_k=64, sample_tail=True, stratified_samples=stratified)
    assert normalisation.is_compiled(rows, 64)
    assert not normalisation.is_compiled(plain, 64)
    numbers = np.sort(np.random.default_rng(5).random((6, 4)), axis=1)
    inputs = row_tensors.RowInputs(
        targets=torch.arange(6),
        queries=torch.tensor([[5, -1]] * 6),
        uniforms=torch.from_numpy(numbers),
        hidden_states=torch.zeros(6, 3),
    )
    one, other = (row_tensors.row_tensors(each, options, inputs) for each in (rows, plain))
    assert one.finite.tolist() == other.finite.tolist() == [True, True, False, True, False, True]
    for name in ("token_ids", "logprobs", "target_logprobs", "log_tail", "log_partitions", "query_logprobs"):
        found, wanted = getattr(one, name)[one.finite], getattr(other, name)[one.finite]
        assert torch.allclose(found.float(), wanted.float(), atol=3e-6, rtol=1e-6), name
    assert one.sampled_token_ids is not None
    assert other.sampled_token_ids is not None
    assert torch.equal(one.sampled_token_ids[one.finite], other.sampled_token_ids[one.finite])
    assert ((other.sampled_token_ids >= 0) & (other.sampled_token_ids < size)).all()


def test_buffers_of_inference_mode_serve_outside_it() -> None:
    options = DistributionOptions(top_k=3, num_sampled_tokens=2)
    wide = torch.cat([logits()] * 8, dim=1)  # larger than any buffer so far
    with torch.inference_mode():
        first = distributions(wide, identity, target(), options, vocab_size=8 * V)
    again = distributions(wide, identity, target(), options, vocab_size=8 * V)
    assert first.sampled_token_ids is not None
    assert again.sampled_token_ids is not None
    assert np.array_equal(first.sampled_token_ids, again.sampled_token_ids)
