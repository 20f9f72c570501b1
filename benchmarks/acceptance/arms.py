"""Arms of the acceptance experiment: each student's loss as in a run file, and the claims about the results."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.acceptance.languages import NUM_LOGITS
from benchmarks.distillation.report import Interval, paired_interval

Group = Literal["dense", "sparse", "on-policy"]
ALL_TOKENS = NUM_LOGITS
"""top_k without a tail."""
FEW_TOKENS = 8
SHUFFLED_TOP_K = ALL_TOKENS - 1
"""Streams with this top_k go through the shuffling proxy; evaluations use ALL_TOKENS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One training objective."""

    name: str
    loss: Mapping[str, Any]
    """Loss section of a run file."""
    shuffled: bool = False
    """The teacher's rows come in a shuffled order."""
    program: str = ""
    """Module in place of the run service's training process, for what no run file expresses."""


CROSS_ENTROPY = Arm(
    name="cross-entropy",
    loss={"terms": [{"divergence": "forward_kl", "weight": 0}], "hard_weight": 1, "top_k": ALL_TOKENS},
)
FULL = Arm(name="full vocabulary", loss={"top_k": ALL_TOKENS, "sparse_target": "tail_bucket"})
TAIL = Arm(name="top-8 + tail", loss={"top_k": FEW_TOKENS, "sparse_target": "tail_bucket"})
RENORMALISED = Arm(name="top-8 renormalised", loss={"top_k": FEW_TOKENS, "sparse_target": "renormalise"})
SAMPLED = Arm(
    name="random sampling, 8 draws",
    loss={"top_k": 1, "sparse_target": "sampled", "num_samples": FEW_TOKENS},
)
SHUFFLED = Arm(
    name="control: rows shuffled",
    loss={"top_k": SHUFFLED_TOP_K, "sparse_target": "tail_bucket"},
    shuffled=True,
)
REVERSE_KL = Arm(
    name="reverse KL on the student's top-8",
    loss={"terms": [{"divergence": "reverse_kl"}], "top_k": FEW_TOKENS},
)
POLICY_GRADIENT = Arm(
    name="policy gradient",
    loss={"terms": [{"divergence": "reverse_kl", "estimator": "policy_gradient"}], "top_k": 1},
)
K1_AS_LOSS = Arm(
    name="control: k1 taken as a loss", loss=POLICY_GRADIENT.loss, program="benchmarks.acceptance.k1_control"
)
SHUFFLED_REVERSE_KL = Arm(
    name="control: rows shuffled",
    loss={"terms": [{"divergence": "reverse_kl"}], "top_k": SHUFFLED_TOP_K},
    shuffled=True,
)

ARMS: Mapping[Group, Sequence[Arm]] = {
    "dense": (CROSS_ENTROPY, FULL, TAIL, SAMPLED, SHUFFLED),
    "sparse": (CROSS_ENTROPY, FULL, TAIL, RENORMALISED, SAMPLED),
    "on-policy": (REVERSE_KL, POLICY_GRADIENT, K1_AS_LOSS, SHUFFLED_REVERSE_KL),
}


MAX_CURVE_DIFFERENCE = 1e-5
"""Largest difference between the losses of equivalent runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmMetrics:
    """Metrics by group, arm and seed."""

    values: Mapping[Group, Mapping[str, Sequence[float]]]
    """Held-out KL(truth || student); on-policy, the student's KL(student || teacher), after over before."""
    curves: Mapping[str, Sequence[float]]
    """Largest difference of a step's loss to the same run online, by variant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A claim about the metrics."""

    name: str
    low: float
    """Lower end of the metric: a 95 % interval, or the extremes over seeds."""
    high: float
    above: float | None = None
    below: float | None = None

    @property
    def holds(self) -> bool:
        """True if the complete interval is within the bounds."""
        return (self.above is None or self.low > self.above) and (
            self.below is None or self.high < self.below
        )

    def __str__(self) -> str:
        bound = f"below {self.below:g}" if self.above is None else f"above {self.above:g}"
        found = f"[{self.low:+.4g}, {self.high:+.4g}]"
        return f"{'pass' if self.holds else 'FAIL'}: {self.name}: {found}, must be {bound}"


def gain(found: ArmMetrics, group: Group, arm: Arm, over: Arm = CROSS_ENTROPY) -> Interval:
    """Improvement of an arm, in nats, paired over seeds."""
    values = found.values[group]
    return paired_interval(values[over.name], values[arm.name])


def drop(found: ArmMetrics, arm: Arm) -> Interval:
    """Removed share of the reverse KL."""
    ratios = found.values["on-policy"][arm.name]
    return paired_interval([1.0] * len(ratios), ratios)


ORDER = (FULL, SAMPLED, TAIL, CROSS_ENTROPY, RENORMALISED)
"""Expected order on the sparse language, best first."""


def claims(found: ArmMetrics) -> list[Claim]:
    """Claims, each on its complete 95 % interval."""
    return list(_claims(found))


def _claims(found: ArmMetrics) -> Iterator[Claim]:
    for arm in (FULL, TAIL, SAMPLED):
        yield _claim(f"dense, nats gained by {arm.name}", gain(found, "dense", arm), above=0.05)
    yield _claim(f"dense, nats gained by {SHUFFLED.name}", gain(found, "dense", SHUFFLED), below=0)
    for better, worse in itertools.pairwise(ORDER):
        name = f"sparse, nats gained by {better.name} over {worse.name}"
        yield _claim(name, gain(found, "sparse", better, worse), above=0)
    for arm, share in ((REVERSE_KL, 0.2), (POLICY_GRADIENT, 0.08)):
        yield _claim(f"on-policy, share taken by {arm.name}", drop(found, arm), above=share)
    for arm in (K1_AS_LOSS, SHUFFLED_REVERSE_KL):
        yield _claim(f"on-policy, share taken by {arm.name}", drop(found, arm), below=0)
    for way, values in found.curves.items():
        name = f"curves, largest difference, {way}"
        yield Claim(name=name, low=min(values), high=max(values), below=MAX_CURVE_DIFFERENCE)


def _claim(name: str, interval: Interval, *, above: float | None = None, below: float | None = None) -> Claim:
    return Claim(name=name, low=interval.low, high=interval.high, above=above, below=below)
