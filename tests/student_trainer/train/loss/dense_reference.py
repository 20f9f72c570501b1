"""Dense float64 references for the sparse losses, and random teachers to compare them on."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.student_trainer.train.loss.sparse import PAD_ID, SparseTargets


def random_logits(*shape: int, seed: int, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Samples logits of a distribution that is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def targets_of(
    teacher_logits: Tensor, top_k: int, *, temperature: float | None = None, pads: int = 0
) -> SparseTargets:
    """Returns the top-k outputs of a teacher with these logits, without rounding; `pads` adds columns of PAD_ID."""
    logprobs = teacher_logits.double().log_softmax(-1)
    kept, token_ids = logprobs.topk(top_k, dim=-1)
    rest = logprobs.scatter(-1, token_ids, -torch.inf)
    log_partition = None if temperature is None else (logprobs / temperature).logsumexp(-1).float()
    if pads:
        empty = torch.full((*kept.shape[:-1], pads), -torch.inf, dtype=kept.dtype)
        kept = torch.cat([kept, empty], dim=-1)
        token_ids = torch.cat([token_ids, torch.full(empty.shape, PAD_ID)], dim=-1)
    return SparseTargets(
        token_ids=token_ids,
        logprobs=kept.float(),
        log_tail=rest.logsumexp(-1).float(),
        log_partition=log_partition,
    )


def dense_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Computes KL(teacher || student) over the whole vocabulary, per position, in float64."""
    log_p = (teacher_logits.double() / temperature).log_softmax(-1)
    log_q = (student_logits.double() / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def dense_bucket_kl(teacher_logits: Tensor, student_logits: Tensor, top_k: int) -> Tensor:
    """Computes KL(teacher || student) on the teacher's top-k and the rest as one event, per position, in float64."""
    p, q = teacher_logits.double().softmax(-1), student_logits.double().softmax(-1)
    kept, token_ids = p.topk(top_k, dim=-1)
    kept_q = q.gather(-1, token_ids)
    tail_p = p.scatter(-1, token_ids, 0.0).sum(-1)
    tail_q = q.scatter(-1, token_ids, 0.0).sum(-1)
    return (kept * (kept / kept_q).log()).sum(-1) + tail_p * (tail_p / tail_q).log()
