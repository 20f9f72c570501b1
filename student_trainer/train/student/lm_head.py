"""The student's output layer (LM head): losses are fused with it if it is plain, so that its logits never exist at once.

A layer is plain if the model returns exactly its output, and without it exactly its input, which is tried and read
from the configuration. Models that cap or scale their logits, and adapters on the layer itself, are not plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
TRIAL_LOGITS = 1000.0
"""Spread of the outputs of a trial: far above any cap."""
_LOGIT_SETTINGS: Mapping[str, float] = {
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "logits_mup_width_multiplier": 1.0,
    "logits_soft_cap": 0.0,
    "output_logit_soft_cap": 0.0,
    "output_multiplier": 1.0,
}
"""Settings by which architectures cap or scale logits, with the value that leaves them."""


class LmHead:
    """Computes hidden states and logits of a student's targets."""

    def __init__(self, student: Student) -> None:
        self._student = student
        self._linear = _plain_layer(student.model) if student.is_language_model else None

    @property
    def layer(self) -> OutputLayer | None:
        """The output layer if it is plain, else None."""
        if self._linear is None:
            return None
        return OutputLayer(weight=self._linear.weight, bias=self._linear.bias)

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Returns the input of the plain layer for each target of `batch`, [N, H]."""
        assert self._linear is not None, "only a plain layer can be bypassed"
        with _replaced(self._linear, _identity):
            return self._student.logits(batch)[0]

    def hidden_and_states(self, batch: MicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns the input of the plain layer, and the hidden states as `Student.logits_and_states` does."""
        assert self._linear is not None, "only a plain layer can be bypassed"
        with _replaced(self._linear, _identity):
            hidden, states = self._student.logits_and_states(batch)
        return hidden[0], states

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
    """Returns the output layer of a causal language model if the logits are its plain output, else None.

    Configuration and structure decide, and a trial in which the layer puts out large numbers: weights do not, which may
    be random and small at first, so a resumed run decides as it did before.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = plain.get_output_embeddings()
    # Subclasses are quantised or adapted layers, with another matmul.
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if _changes_logits(plain.config) or _changes_logits(plain.config.get_text_config()):
        return None
    device, dtype = layer.weight.device, layer.weight.dtype
    token_ids = torch.tensor([[1, 0, 1]], device=device)
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(1, token_ids.shape[1], layer.out_features, generator=generator) * TRIAL_LOGITS
    large = large.to(device, dtype)
    inputs: list[Tensor] = []

    def put_out_large(hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return large

    try:
        with evaluation_mode(model), torch.no_grad():
            with _replaced(layer, put_out_large):
                logits = model(input_ids=token_ids, use_cache=False).logits
            with _replaced(layer, _identity):
                hidden = model(input_ids=token_ids, use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, IndexError):  # what follows the layer needs its real shape
        return None
    if len(inputs) != 1 or not torch.equal(logits.float(), large.float()):
        return None
    same = hidden.shape == inputs[0].shape and torch.allclose(
        hidden.float(), inputs[0].float(), rtol=1e-2, atol=1e-2
    )
    return layer if same else None


def _changes_logits(config: Any) -> bool:
    """Returns True if a model of `config` caps or scales its logits."""
    return any(
        getattr(config, name, None) not in (None, neutral) for name, neutral in _LOGIT_SETTINGS.items()
    )


@contextmanager
def _replaced(layer: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Makes the layer compute `forward` inside the block."""
    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer)["forward"]


def _identity(hidden: Tensor) -> Tensor:
    return hidden
