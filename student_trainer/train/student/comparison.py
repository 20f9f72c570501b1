"""Compares what two copies of a student compute on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.student_trainer.train.student.student import evaluation_mode

FULL_TOLERANCE = 1e-3
"""Largest difference in float32, as a share of the spread of the logits."""
HALF_TOLERANCE = 0.25
"""The same where either copy has weights of 16 bits or fewer: rounding adds up over layers, and experts change."""
ROWS, TOKENS = 2, 16


@dataclass(frozen=True, slots=True)
class Probe:
    """Logits of one copy on random tokens."""

    ids: Tensor
    logits: Tensor
    is_full: bool
    """True if all weights have 32 bits."""

    @classmethod
    def of(cls, model: Any, vocab_size: int) -> Probe:
        """Computes the logits of `model` on tokens below `vocab_size`."""
        size = min(vocab_size, model.get_input_embeddings().weight.shape[0])
        ids = torch.randint(size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
        return cls(ids, _logits(model, ids), _is_full(model))

    def difference(self, model: Any) -> float:
        """Returns the distance of the logits of `model` as a share of the spread of the first ones."""
        centred = self.logits - self.logits.mean(-1, keepdim=True)
        distance = (_logits(model, self.ids) - self.logits).norm()
        return float(distance / centred.norm().clamp_min(1e-6))

    def tolerance(self, model: Any) -> float:
        """Returns the largest difference that rounding explains."""
        return FULL_TOLERANCE if self.is_full and _is_full(model) else HALF_TOLERANCE


def _logits(model: Any, ids: Tensor) -> Tensor:
    device = model.get_input_embeddings().weight.device
    with evaluation_mode(model), torch.no_grad():
        options = {"use_cache": False} if model.can_generate() else {}
        logits: Tensor = model(input_ids=ids.to(device), **options).logits
    return logits.float().cpu()


def _is_full(model: Any) -> bool:
    return all(each.dtype == torch.float32 for each in model.parameters())
