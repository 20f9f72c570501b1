"""Divergences at a softmax temperature from top-k log-probabilities: exact with the teacher's log-partition, else conditional.

With l = log p over the whole vocabulary, p_T(i) = exp(l_i / T - A_T), A_T = log sum_v exp(l_v / T). The kept tokens and
A_T give the tail of p_T without error; the kept tokens alone do not, however large K is. Axes as in sparse.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.student_trainer.train.loss.divergences import Divergence
from stillhouse.student_trainer.train.loss.sparse import BucketPair, normalise

TemperatureMode = Literal["exact", "conditional"]


def bucket_temperature(temperature: float, mode: TemperatureMode) -> float:
    """Returns the temperature of both sides' buckets: 1 for conditional divergences."""
    return temperature if mode == "exact" else 1.0


def tempered_divergence(
    divergence: Divergence, pair: BucketPair, *, temperature: float, mode: TemperatureMode
) -> Float[Tensor, "B T"]:
    """Returns the loss per position at `temperature`, times T^2, which keeps the size of the gradient.

    `pair` is at `bucket_temperature`. exact: T^2 D(p_T || q_T). conditional: the split into kept and tail is compared
    at temperature 1, and the kept tokens among themselves at T: D(p' || q') of p' = (P_S p_T(.|S), P_tail) has the part D((P_S, P_tail) || (Q_S, Q_tail)), and
    the rest of it, which is not negative for an f-divergence, gets the factor T^2. For KL that is the chain rule
    KL(P_S || Q_S) + P_S T^2 KL(p_T(.|S) || q_T(.|S)). At T = 1 both modes are D of the buckets.
    """
    if temperature == 1.0 or mode == "exact":
        return temperature**2 * divergence(pair.teacher_logprobs, pair.student_logprobs)
    split = divergence(_kept_and_tail(pair.teacher_logprobs), _kept_and_tail(pair.student_logprobs))
    sharpened = divergence(
        _sharpen(pair.teacher_logprobs, temperature), _sharpen(pair.student_logprobs, temperature)
    )
    return split + temperature**2 * (sharpened - split)


def _kept_and_tail(logprobs: Float[Tensor, "B T S"]) -> Float[Tensor, "B T 2"]:
    """Merges the kept tokens into one bucket beside the tail."""
    return torch.stack([_log_mass(logprobs[..., :-1]), logprobs[..., -1]], dim=-1)


def _sharpen(logprobs: Float[Tensor, "B T S"], temperature: float) -> Float[Tensor, "B T S"]:
    """Applies `temperature` to the kept tokens among themselves; their total mass and the tail are unchanged."""
    kept = logprobs[..., :-1]
    log_mass = _log_mass(kept).unsqueeze(-1)
    empty = torch.isneginf(kept)
    shares = normalise(kept.masked_fill(empty.all(-1, keepdim=True), 0.0) / temperature)
    return torch.cat([(shares + log_mass).masked_fill(empty, -torch.inf), logprobs[..., -1:]], dim=-1)


def _log_mass(logprobs: Float[Tensor, "B T K"]) -> Float[Tensor, "B T"]:
    """Returns log sum exp over the kept tokens; -inf, without a gradient, if there are none."""
    empty = torch.isneginf(logprobs).all(-1)
    return logprobs.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(empty, -torch.inf)
