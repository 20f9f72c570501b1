"""The student's output layer (LM head): losses are fused with it if it is plain, so that its logits never exist at once.

A layer is plain if the model without it returns exactly the layer's input, which is tested and not read from a name.
Models that cap or scale their logits, and adapters on the layer itself, are not plain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.student_trainer.train.batching.collate import MicroBatch
from stillhouse.student_trainer.train.loss.fused import OutputLayer
from stillhouse.student_trainer.train.student.student import Student, evaluation_mode

CHUNK_LOGITS = 2**27
"""Logits held at a time without gradients."""


class LmHead:
    """Computes hidden states and logits of a student's targets."""

    def __init__(self, student: Student) -> None:
        self._student = student
        self._linear = _plain_layer(student.model)

    @property
    def layer(self) -> OutputLayer | None:
        """The output layer if it is plain, else None."""
        if self._linear is None:
            return None
        return OutputLayer(weight=self._linear.weight, bias=self._linear.bias)

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Returns the input of the plain layer for each target of `batch`, [N, H]."""
        assert self._linear is not None, "only a plain layer can be bypassed"
        with _bypassed(self._linear):
            return self._student.logits(batch)[0]

    def logit_chunks(self, batch: MicroBatch) -> Iterator[tuple[slice, Tensor]]:
        """Yields slices of the targets of `batch` and their logits [1, n, V], a bounded number at a time."""
        if self._linear is None:
            yield slice(0, batch.num_targets), self._student.logits(batch)
            return
        hidden = self.hidden(batch)
        size = max(1, CHUNK_LOGITS // self._linear.weight.shape[0])
        for first in range(0, batch.num_targets, size):
            rows = slice(first, min(first + size, batch.num_targets))
            yield rows, functional.linear(hidden[rows], self._linear.weight, self._linear.bias).unsqueeze(0)


def _plain_layer(model: Any) -> nn.Linear | None:
    """Returns the output layer of a causal language model if the logits are its plain output, else None."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = plain.get_output_embeddings()
    # Subclasses are quantised or adapted layers, with another matmul.
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    token_ids = torch.tensor([[1, 0, 1]], device=layer.weight.device)
    with evaluation_mode(model), torch.no_grad():
        expected = model(input_ids=token_ids, use_cache=False).logits
        with _bypassed(layer):
            hidden = model(input_ids=token_ids, use_cache=False).logits
    if hidden.shape[-1] != layer.in_features:
        return None
    found = layer(hidden.to(layer.weight.dtype))
    return layer if torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-3) else None


@contextmanager
def _bypassed(layer: nn.Linear) -> Iterator[None]:
    """Makes the layer return its input inside the block."""
    vars(layer)["forward"] = _identity
    try:
        yield
    finally:
        del vars(layer)["forward"]


def _identity(hidden: Tensor) -> Tensor:
    return hidden
