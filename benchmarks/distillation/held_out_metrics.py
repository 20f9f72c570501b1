"""Held-out metrics of a student over the complete vocabulary, and gradients of sparse targets beside the full ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.student_trainer.config.schema import LossConfig
from stillhouse.student_trainer.train.loss.objective import objective
from stillhouse.student_trainer.train.loss.sparse import DenseTargets

CALIBRATION_BINS = 15


def held_out_metrics(teacher: Any, student: Any, rows: Tensor, loss: LossConfig) -> dict[str, float]:
    """Means over held-out tokens: "divergence", the loss itself over all tokens; "kl", KL(teacher || student) at
    temperature 1; "accepted", sum_v min(p, q), the share of the student's tokens that speculative decoding would accept;
    "ece", the expected calibration error of the student's top-1 against the text."""
    sums: dict[str, float] = {"divergence": 0.0, "kl": 0.0, "accepted": 0.0}
    confidences, hits = [], []
    with torch.no_grad():
        for batch in torch.split(rows, 1):  # little enough for a cache
            log_p, log_q = (
                model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
                for model in (teacher, student)
            )
            text = batch[:, 1:].reshape(-1)
            targets = DenseTargets(logprobs=log_p.unsqueeze(0))
            whole = objective(log_q.unsqueeze(0), text.unsqueeze(0), targets, torch.ones(1, len(text)), loss)
            sums["divergence"] += whole.loss_sum.item()
            sums["kl"] += (log_p.exp() * (log_p - log_q)).sum().item()
            sums["accepted"] += torch.minimum(log_p, log_q).exp().sum().item()
            top = log_q.max(-1)
            confidences.append(top.values.exp())
            hits.append((top.indices == text).float())
    num_tokens = rows.shape[0] * (rows.shape[1] - 1)
    found = {name: total / num_tokens for name, total in sums.items()}
    return found | {"ece": calibration_error(torch.cat(confidences), torch.cat(hits))}


def calibration_error(confidences: Tensor, hits: Tensor) -> float:
    """Mean over bins of confidence, by their size, of |mean confidence - accuracy|."""
    bins = (confidences * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    totals = torch.zeros(CALIBRATION_BINS).index_add(0, bins, confidences - hits)
    return float(totals.abs().sum() / len(hits))


def truncated_kl(log_q: Tensor, log_p: Tensor, top_k: int, *, clamp: bool) -> tuple[Tensor, Tensor]:
    """The loss that others take from a top-k: sum_k p (log p - log q) without a tail and without normalisation, which can
    be negative and is then clamped at 0; and the share of positions at which it is."""
    top = log_p.topk(top_k, -1)
    loss = (top.values.exp() * (top.values - log_q.gather(-1, top.indices))).sum(-1)
    below = (loss < 0).float().mean()
    return (loss.clamp(min=0.0) if clamp else loss).sum(), below


def gradient_cosines(
    parameters: Sequence[Tensor], full: Callable[[], Tensor], others: Mapping[str, Callable[[], Tensor]]
) -> dict[str, float]:
    """Cosine of each loss's gradient with that of the full one."""
    reference = _gradient(parameters, full())
    return {
        name: float(torch.nn.functional.cosine_similarity(_gradient(parameters, loss()), reference, dim=0))
        for name, loss in others.items()
    }


def _gradient(parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(parameters))])
