"""Sampling in the worker tier: the distribution of each row, however rows are batched, fixed by seed and position."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.distributions.row_tensors import RowTensors
from stillhouse.teacher_service.engine import DistributionOptions, GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.vllm.worker import batch_sampling
from stillhouse.teacher_service.engines.vllm.worker.batch_sampling import sample_rows
from stillhouse.teacher_service.engines.vllm.worker.request_plan import (
    KEY,
    MISSING,
    SamplingPlan,
    ScorePlan,
    column_counts,
    pack,
    read_plan,
    score_start,
    unpack,
)

V, VALID = 3000, 2990


def plan(seed: int = 0, **how: Any) -> SamplingPlan:
    item = GenerateInput(token_ids=np.zeros(1, np.int32), **how)
    return SamplingPlan.from_input(item, seed=seed, num_valid=VALID)


def row(seed: int, scale: float = 2.0) -> torch.Tensor:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(seed)) * scale
    logits[VALID:] = 50.0  # padding is never sampled, however likely
    return logits


def reference(logits_V: torch.Tensor, how: SamplingPlan) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Probabilities of all ids, by sorting."""
    probs = (logits_V[:VALID].double() / how.temperature).softmax(-1).numpy()
    order = np.argsort(-probs, kind="stable")
    if how.top_k:
        order = order[: how.top_k]
    sums = np.cumsum(probs[order] / probs[order].sum())
    kept = order[: int(np.searchsorted(sums, how.top_p)) + 1] if how.top_p < 1 else order
    wanted = np.zeros(VALID)
    wanted[kept] = probs[kept] / probs[kept].sum()
    return wanted


HOW: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_p": 0.95},
    {"top_p": 0.2},
    {"top_k": 7},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.6},
    {"temperature": 2.0, "top_k": 2000},
]


@pytest.mark.parametrize("how", HOW)
def test_samples_follow_the_distribution_and_report_its_logprobs(how: dict[str, Any]) -> None:
    logits_V, count = row(1), 4000
    drawn = sample_rows(logits_V.expand(count, V), [plan(seed, **how) for seed in range(count)], [3] * count)
    wanted = reference(logits_V, plan(**how))
    ids = drawn.token_ids.numpy()
    assert wanted[ids].min() > 0
    np.testing.assert_allclose(drawn.logprobs, np.log(wanted[ids]), atol=2e-4)
    shares = np.bincount(ids, minlength=VALID) / count
    # Five standard errors of every share, and one sample.
    assert (np.abs(shares - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / count) + 1 / count).all()


def test_a_row_of_a_batch_is_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [plan(seed, **how) for seed, how in enumerate([*HOW, {"temperature": 0.0}, *HOW])]
    logits_BV = torch.stack([row(number) for number in range(len(plans))])
    whole = sample_rows(logits_BV, plans, list(range(len(plans))))
    alone = [sample_rows(logits_BV[n : n + 1], [plans[n]], [n]) for n in range(len(plans))]
    assert whole.token_ids.tolist() == [int(each.token_ids) for each in alone]
    np.testing.assert_allclose(whole.logprobs, [float(each.logprobs) for each in alone], atol=1e-5)
    greedy = len(HOW)
    assert int(whole.token_ids[greedy]) == int(logits_BV[greedy, :VALID].argmax())
    assert float(whole.logprobs[greedy]) == 0
    # A nucleus larger than the first candidates.
    monkeypatch.setattr(batch_sampling, "FIRST_CANDIDATES", 4)
    again = sample_rows(logits_BV, plans, list(range(len(plans))))
    assert again.token_ids.tolist() == whole.token_ids.tolist()


def test_a_sample_depends_on_seed_and_position_alone() -> None:
    logits_BV = torch.zeros(8, V)
    first = sample_rows(logits_BV, [plan(7)] * 8, list(range(8))).token_ids.tolist()
    assert len(set(first)) == 8
    assert sample_rows(logits_BV[:1], [plan(7)], [5]).token_ids.tolist() == first[5:6]
    for seed in (8, 2**64 - 1, 2**32 + 7):
        assert sample_rows(logits_BV, [plan(seed)] * 8, list(range(8))).token_ids.tolist() != first


def test_plans_survive_serialisation_to_the_worker() -> None:
    options = DistributionOptions(top_k=3, temperatures=(0.5, 2.0), num_sampled_tokens=2, seed=-(2**63))
    query = np.array([[1, -1], [2, 3], [4, 5]], np.int32)
    item = ScoreInput(token_ids=np.arange(5, dtype=np.int32), start=2, options=options, query_token_ids=query)
    argument = ScorePlan.from_input(item).to_extra_args()
    # vLLM's messages turn a tuple into a list.
    assert not any(isinstance(each, tuple) for each in argument[KEY]["options"].values())
    read = read_plan(argument)
    assert isinstance(read, ScorePlan)
    assert (read.start, read.last, read.options) == (2, 4, options)
    assert hash(read.options) == hash(options)
    assert read.query_token_ids is not None
    assert np.array_equal(read.query_token_ids, query)
    assert score_start(argument) == 2
    drawing = plan(2**64 - 1, temperature=0.5, options=options)
    assert read_plan(drawing.to_extra_args()) == drawing
    nothing: list[dict[str, Any] | None] = [None, {}, {"other": 1}, {KEY: {}}]
    for none in nothing:
        assert read_plan(none) is None
        assert score_start(none) is None
    assert score_start(drawing.to_extra_args()) is None


def test_rows_survive_packing() -> None:
    generator = np.random.default_rng(1)

    def values(*shape: int) -> Any:
        return generator.normal(size=(3, *shape)).astype(np.float32)

    options = DistributionOptions(
        top_k=4,
        temperatures=(0.5, 2.0),
        num_sampled_tokens=2,
        entropy=True,
        hidden_states=True,
        sampled_logprobs=True,
    )
    rows = Distributions(
        start=5,
        token_ids=generator.integers(0, 50, (3, 4)).astype(np.int32),
        logprobs=values(4),
        target_logprobs=values(),
        log_tail=values(),
        log_partitions=values(2),
        query_logprobs=values(3),
        sampled_token_ids=generator.integers(0, 50, (3, 2)).astype(np.int32),
        sampled_logprobs=values(2),
        entropy=values(),
        hidden_states=values(6),
    )
    parts = {
        each.name: torch.from_numpy(getattr(rows, each.name))
        for each in fields(RowTensors)
        if each.name != "finite"
    }
    tensors = RowTensors(**parts, finite=torch.tensor([True, True, True]))
    ids, columns, none = (each.numpy() for each in pack(tensors, torch.tensor([7, 8, 9])))
    assert none.shape == (3, 0)
    sizes: dict[str, Any] = {"vocab_size": 50, "num_queries": 3, "hidden_size": 6}
    assert (ids.shape[1], columns.shape[1]) == column_counts(options, **sizes)
    got = unpack(ids, columns, start=5, options=options, **sizes)
    assert not got.missing
    assert got.sampling_logprobs.tolist() == [0, 0, 0]
    for name in Distributions.__slots__:
        assert np.array_equal(getattr(got.rows, name), getattr(rows, name)), name
    halved = [each.numpy() for each in pack(tensors, torch.tensor([7, 8, 9]), half=True)]
    assert [each.shape[1] for each in halved] == [ids.shape[1], columns.shape[1] - 4, 4]
    rounded = replace(rows, logprobs=rows.logprobs.astype(np.float16).astype(np.float32))
    got = unpack(*halved, start=5, options=options, **sizes)
    for name in Distributions.__slots__:
        assert np.array_equal(getattr(got.rows, name), getattr(rounded, name)), name
    with pytest.raises(RuntimeError, match="were requested"):
        unpack(ids, columns[:, :-1], start=5, options=options, **sizes)
    broken = replace(tensors, finite=torch.tensor([True, False, True]))
    columns = pack(broken, torch.tensor([7, 8, 9]))[1].numpy()
    with pytest.raises(StillhouseError, match="position 6 ") as caught:
        unpack(ids, columns, start=5, options=options, **sizes)
    assert caught.value.reason is Reason.NON_FINITE
    ids[2, 0] = MISSING
    assert unpack(ids, columns, start=5, options=replace(options, top_k=4), **sizes).missing
