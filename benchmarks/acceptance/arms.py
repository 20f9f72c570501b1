"""The arms of the acceptance experiment: how each student learns, as the run file says it, and what must come of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.acceptance.languages import NUM_LOGITS
from benchmarks.distillation.report import Interval, paired_interval

Group = Literal["dense", "sparse", "on-policy"]
ALL_TOKENS = NUM_LOGITS
"""top_k with which nothing is left for a tail."""
FEW_TOKENS = 8
SHUFFLED_TOP_K = ALL_TOKENS - 1
"""Streams that ask for it go through the shuffling proxy; evaluations ask for ALL_TOKENS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to learn."""

    name: str
    loss: Mapping[str, Any]
    """The loss of a run file."""
    shuffled: bool = False
    """The teacher's rows come in a wrong order."""
    program: str = ""
    """Module that trains in the place of the run service's training process, for what no run file can ask for."""


CROSS_ENTROPY = Arm(
    name="cross-entropy",
    loss={"terms": [{"divergence": "forward_kl", "weight": 0}], "hard_weight": 1, "top_k": ALL_TOKENS},
)
FULL = Arm(name="full vocabulary", loss={"top_k": ALL_TOKENS})
TAIL = Arm(name="top-8 + tail", loss={"top_k": FEW_TOKENS})
RENORMALISED = Arm(name="top-8 renormalised", loss={"top_k": FEW_TOKENS, "sparse_target": "renormalise"})
SAMPLED = Arm(
    name="random sampling, 8 draws",
    loss={"top_k": 1, "sparse_target": "sampled", "num_samples": FEW_TOKENS},
)
SHUFFLED = Arm(name="control: rows shuffled", loss={"top_k": SHUFFLED_TOP_K}, shuffled=True)
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
"""Between the losses of runs that must be the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What was measured, by group, arm and seed."""

    values: Mapping[Group, Mapping[str, Sequence[float]]]
    """Held-out KL(truth || student); on-policy the student's KL(student || teacher), after over before."""
    curves: Mapping[str, Sequence[float]]
    """The largest difference of a step's loss to that of the same run online, by the way it was taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """Something that must hold of all that was found."""

    name: str
    low: float
    """What was found lies between `low` and `high`: a 95 % interval, or the extremes of all seeds."""
    high: float
    above: float | None = None
    below: float | None = None

    @property
    def holds(self) -> bool:
        """Whether all of it lies within the bounds."""
        return (self.above is None or self.low > self.above) and (
            self.below is None or self.high < self.below
        )

    def __str__(self) -> str:
        bound = f"below {self.below:g}" if self.above is None else f"above {self.above:g}"
        found = f"[{self.low:+.4g}, {self.high:+.4g}]"
        return f"{'pass' if self.holds else 'FAIL'}: {self.name}: {found}, must be {bound}"


def gain(found: Found, group: Group, arm: Arm, over: Arm = CROSS_ENTROPY) -> Interval:
    """By how much the arm is better, in nats; paired over seeds."""
    values = found.values[group]
    return paired_interval(values[over.name], values[arm.name])


def drop(found: Found, arm: Arm) -> Interval:
    """Share of the reverse KL that is gone."""
    ratios = found.values["on-policy"][arm.name]
    return paired_interval([1.0] * len(ratios), ratios)


ORDER = (FULL, SAMPLED, TAIL, CROSS_ENTROPY, RENORMALISED)
"""Of the sparse language, the best first."""


def claims(found: Found) -> list[Claim]:
    """What must hold, each with its whole 95 % interval."""
    return list(_claims(found))


def _claims(found: Found) -> Iterator[Claim]:
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
