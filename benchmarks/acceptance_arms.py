"""The arms of the acceptance experiment: how each student learns, as the run file says it, and what must come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.acceptance_language import NUM_LOGITS
from benchmarks.distillation_report import Interval, paired_interval

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
SHUFFLED_REVERSE_KL = Arm(
    name="control: rows shuffled",
    loss={"terms": [{"divergence": "reverse_kl"}], "top_k": SHUFFLED_TOP_K},
    shuffled=True,
)

ARMS: Mapping[Group, Sequence[Arm]] = {
    "dense": (CROSS_ENTROPY, FULL, TAIL, SAMPLED, SHUFFLED),
    "sparse": (CROSS_ENTROPY, FULL, TAIL, RENORMALISED, SAMPLED),
    "on-policy": (REVERSE_KL, POLICY_GRADIENT, SHUFFLED_REVERSE_KL),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What was measured, by group, arm and seed."""

    values: Mapping[Group, Mapping[str, Sequence[float]]]
    """Held-out KL(truth || student); on-policy the student's KL(student || teacher), after over before."""


def gain(found: Found, group: Group, arm: Arm, over: Arm = CROSS_ENTROPY) -> Interval:
    """By how much the arm is better, in nats; paired over seeds."""
    values = found.values[group]
    return paired_interval(values[over.name], values[arm.name])


def drop(found: Found, arm: Arm) -> Interval:
    """Share of the reverse KL that is gone."""
    ratios = found.values["on-policy"][arm.name]
    return paired_interval([1.0] * len(ratios), ratios)


def claims(found: Found) -> dict[str, bool]:
    """What must hold, each with its whole 95 % interval."""
    return {
        "full vocabulary gains more than 0.05 nats": gain(found, "dense", FULL).low > 0.05,
        "top-8 + tail gains more than 0.05 nats": gain(found, "dense", TAIL).low > 0.05,
        "random sampling gains more than 0.05 nats": gain(found, "dense", SAMPLED).low > 0.05,
        "shuffled rows lose against cross-entropy": gain(found, "dense", SHUFFLED).high < 0,
        "with few successors: full vocabulary before random sampling": gain(
            found, "sparse", FULL, SAMPLED
        ).low
        > 0,
        "with few successors: full vocabulary before top-8 + tail": gain(found, "sparse", FULL, TAIL).low > 0,
        "with few successors: random sampling before cross-entropy": gain(found, "sparse", SAMPLED).low > 0,
        "with few successors: top-8 + tail before renormalised": gain(found, "sparse", TAIL, RENORMALISED).low
        > 0,
        "on-policy reverse KL takes 20 % or more": drop(found, REVERSE_KL).low >= 0.2,
        "on-policy policy gradient takes 8 % or more": drop(found, POLICY_GRADIENT).low >= 0.08,
        "on-policy with shuffled rows takes nothing": drop(found, SHUFFLED_REVERSE_KL).high < 0,
    }
