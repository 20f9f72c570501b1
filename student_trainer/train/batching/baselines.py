"""Leave-one-out baselines for the policy gradient, from other rollouts, so that the gradient stays unbiased.

With A_t = log p(y_t) - log mu(y_t) the baseline b of a text is a mean of A over texts that were drawn independently of it.
E[b grad log q(y_t)] is then b times 0: baselines change the noise of the policy gradient and nothing else, as long as
no importance weight is truncated. "batch": the tokens of all other texts of the step. "group": those of the other
texts of the same prompt. "position": of these the tokens at the same position; where none is so long, the group's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.loss.policy_gradient import MIN_TEACHER_LOGPROB

Baseline = Literal["batch", "group", "position"]


def advantages(scored: ScoredExample) -> NDArray[np.float64]:
    """[n]: A of each token of a rollout, with the weights that sampled it."""
    assert scored.answer is not None, "rollouts are scored"
    assert scored.behaviour_logprobs is not None
    first = scored.example.start - scored.answer.start
    teacher = scored.answer.target_logprobs[first:].astype(np.float64)
    found: NDArray[np.float64] = np.maximum(teacher, MIN_TEACHER_LOGPROB) - scored.behaviour_logprobs
    return found


def batch_sums(scored: Sequence[ScoredExample], context: int) -> tuple[float, float]:
    """Sum of the advantages of a context's rollouts, and number of their tokens."""
    found = [advantages(each) for each in scored if each.context == context]
    return sum(float(each.sum()) for each in found), float(sum(map(len, found)))


def with_baselines(
    scored: Sequence[ScoredExample],
    kinds: Mapping[int, Baseline],
    batches: Mapping[int, tuple[float, float]],
) -> list[ScoredExample]:
    """Adds the baselines of the contexts that have one; `batches` are the `batch_sums` of the whole step."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    found: dict[int, NDArray[np.float64]] = {}
    for number, each in enumerate(scored):
        if each.context in kinds:
            groups[each.context, each.group].append(number)
            found[number] = advantages(each)
    result = list(scored)
    for number, own in found.items():
        each = scored[number]
        kind = kinds[each.context]
        if kind == "batch":
            total, count = batches[each.context]
            baseline = np.full(len(own), _mean(total - float(own.sum()), count - len(own)))
        else:
            others = [found[other] for other in groups[each.context, each.group] if other != number]
            baseline = _group_baseline(others, len(own), by_position=kind == "position")
        result[number] = replace(each, baseline=baseline.astype(np.float32))
    return result


def _group_baseline(
    others: Sequence[NDArray[np.float64]], length: int, *, by_position: bool
) -> NDArray[np.float64]:
    """[length]: the mean of `others`, everywhere or position by position."""
    total, count = np.zeros(length), np.zeros(length)
    for each in others:
        size = min(len(each), length)
        total[:size] += each[:size]
        count[:size] += 1
    group = _mean(sum(float(each.sum()) for each in others), float(sum(map(len, others))))
    if not by_position:
        return np.full(length, group)
    return np.where(count > 0, total / np.maximum(count, 1), group)


def _mean(total: float, count: float) -> float:
    """The mean; 0 of nothing."""
    return total / count if count > 0 else 0.0
