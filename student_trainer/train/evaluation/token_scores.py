"""Scores of a student's distributions at single positions: against the text, and against the teacher's distributions."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stillhouse.student_trainer.train.loss.divergences import DIVERGENCES
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.loss.readout import read_out
from stillhouse.student_trainer.train.loss.sparse import (
    PAD_ID,
    DenseTargets,
    Targets,
    bucket_pair,
    teacher_buckets,
)

TOP_K = 64
"""Tokens of a dense teacher that overlap compares."""


def token_scores(
    logits: Float[Tensor, "1 N V"], here: Positions, *, vocab_size: int, named: Collection[str]
) -> Mapping[str, Tensor]:
    """Returns scores of each position, [N], by name, at temperature 1.

    cross_entropy: -log q of the text's token, in nats. With targets: kl, KL(p || q) over the teacher's tokens and the tail as
    one, a lower bound of that over the vocabulary; agreement, 1 if both have the same likeliest token. If `named`: acceptance,
    1 - TVD(p, q) = sum_v min(p_v, q_v), the probability with which speculative decoding keeps a token that the student
    proposes (Leviathan et al. 2023), over the same tokens and the tail as one, an upper bound; overlap, the share of the
    teacher's top-k in the student's top-k; ece gives confidence, the largest q_v, and correct, 1 if that is the text's token.
    """
    targets = here.targets
    teacher = None
    if targets is not None:
        teacher = teacher_buckets(targets, num_logits=logits.shape[-1], vocab_size=vocab_size)
    readout = read_out(logits, here.target_ids, here.weights, teacher)
    scores = {"cross_entropy": -readout.targets[0]}
    likeliest = logits[0].argmax(-1)
    if "ece" in named:
        top = logits[0].max(-1).values.to(readout.targets.dtype)
        scores["confidence"] = (top - logits[0].to(readout.targets.dtype).logsumexp(-1)).exp()
        scores["correct"] = (likeliest == here.target_ids[0]).float()
    if targets is None or teacher is None or readout.buckets is None:
        return scores
    pair = bucket_pair(teacher, readout.buckets)
    for name, divergence in (("kl", "forward_kl"), ("acceptance", "tvd")):
        if name == "kl" or name in named:
            function = DIVERGENCES[divergence].bind({})
            scores[name] = function(pair.teacher_logprobs, pair.student_logprobs)[0]
    if "acceptance" in named:
        scores["acceptance"] = 1 - scores["acceptance"]
    theirs = _top_k(targets)
    scores["agreement"] = (likeliest == theirs[:, 0]).float()
    if "overlap" in named:
        scores["overlap"] = _overlap(logits[0], theirs)
    return scores


def _top_k(targets: Targets) -> Int64[Tensor, "N K"]:
    """Returns the teacher's likeliest tokens, by falling probability; PAD_ID where there are fewer."""
    if isinstance(targets, DenseTargets):
        logprobs = targets.logprobs[0]
        return logprobs.topk(min(TOP_K, logprobs.shape[-1]), dim=-1).indices
    return targets.token_ids[0]


def _overlap(logits: Float[Tensor, "N V"], theirs: Int64[Tensor, "N K"]) -> Float[Tensor, N]:
    """Returns the share of the teacher's tokens of a position that are among as many likeliest ones of the student."""
    kept = theirs != PAD_ID
    numbers = kept.sum(-1)
    ours = logits.topk(min(theirs.shape[-1], logits.shape[-1]), dim=-1).indices
    rank = torch.arange(ours.shape[-1], device=ours.device)
    counts = rank < numbers[:, None]
    shared = ((theirs[:, :, None] == ours[:, None, :]) & counts[:, None, :]).any(-1) & kept
    return shared.sum(-1) / numbers.clamp(min=1)
