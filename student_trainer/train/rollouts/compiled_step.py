"""Decodes a token of a small model shaped like Llama on a CPU in compiled code: a few calls for all of its operations.

The weights are copies of the model's at the time of construction. Axes: B sequences, R >= B rows, H hidden units, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stillhouse.student_trainer.train.rollouts.llama_step import MOST_COPIED, plain_model, turns, weight_of

HEAD_UNITS = 16
"""Heads have a multiple of so many units, those of a vector."""


class Memory(Protocol):
    """Keys and values of one layer."""

    def grow(self) -> tuple[Tensor, Tensor, int]:
        """Keys and values [B, N, L, D] with another token, whose own are to be filled in, and the number of tokens before it."""


def compiles(model: Any) -> bool:
    """True if `CompiledStep` computes a model for which `llama_step.decodes` holds: in float32 on a CPU, and small."""
    plain = plain_model(model)
    body = plain.model
    weight = body.embed_tokens.weight
    if weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if sum(each.numel() for each in plain.parameters()) > MOST_COPIED:
        return False
    if any(each.dtype != torch.float32 for each in plain.parameters()):
        return False
    return (
        type(body.embed_tokens) is nn.Embedding
        and weight_of(plain.lm_head) is not None
        and all(_is_plain(layer) for layer in body.layers)
    )


def _is_plain(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (
        *(getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")),
    )
    return (
        int(attention.head_dim) % HEAD_UNITS == 0
        and type(mlp.act_fn).__name__ in {"SiLU", "SiLUActivation"}
        and all(weight_of(each) is not None for each in projections)
    )


class CompiledStep:
    """Decodes one more token of each sequence."""

    def __init__(self, model: Any, num_positions: int) -> None:
        """`compiles(model)` must hold, and positions be below `num_positions`."""
        plain = plain_model(model)
        body = plain.model
        self._embedding: Tensor = body.embed_tokens.weight.detach()
        self._turns = turns(body, num_positions).contiguous().numpy()
        self._layers = [_Layer(layer) for layer in body.layers]
        self._norm = _norm(body.norm)
        self._head = _joined(plain.lm_head)
        self._num_logits = int(plain.lm_head.out_features)
        self._rows: _Rows | None = None

    def __call__(
        self, ids_B: Tensor, positions_B: Tensor, padding_B: NDArray[np.int64], memory: Sequence[Memory]
    ) -> Tensor:
        """Logits [B, V] behind `ids_B`; the first `padding_B` keys of each sequence are none of its own."""
        from stillhouse.student_trainer.train.rollouts import llama_layer_numba

        batch = len(ids_B)
        rows = self._rows
        if rows is None or rows.batch != batch:
            rows = self._rows = _Rows(batch, self._layers[0], self._embedding.shape[1])
        torch.index_select(self._embedding, 0, ids_B, out=rows.hidden_BH)
        positions = positions_B.numpy()
        for layer, own in zip(self._layers, memory, strict=True):
            keys, values, num_keys = own.grow()
            llama_layer_numba.attend(
                rows.hidden,
                rows.number,
                *layer.before,
                *layer.attend_in,
                *layer.head_norms,
                self._turns,
                positions,
                padding_B,
                keys.numpy(),
                values.numpy(),
                num_keys,
                layer.scaling,
                *layer.attend_out,
                rows.normed,
                rows.heads,
                rows.attended,
                rows.added,
            )
            llama_layer_numba.transform(
                rows.hidden,
                batch,
                rows.number,
                *layer.after,
                *layer.mlp_in,
                *layer.mlp_out,
                rows.normed,
                rows.gates,
                rows.added,
            )
        logits = np.empty((rows.number, self._head[1].size), np.float32)
        llama_layer_numba.logits(
            rows.hidden, batch, rows.number, *self._norm, *self._head, rows.normed, logits
        )
        return torch.from_numpy(logits)[:batch, : self._num_logits]


class _Layer:
    """Weights of one layer as compiled code takes them."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = int(attention.head_dim)
        self.num_keys = int(attention.config.num_key_value_heads)
        self.num_queries = int(attention.num_key_value_groups) * self.num_keys
        self.scaling = np.float32(attention.scaling)
        self.before, self.after = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        of_heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        epsilon = next((_epsilon(norm) for norm in of_heads if norm is not None), np.float32(0))
        self.head_norms = (*map(_norm_weight, of_heads), epsilon)
        self.attend_in = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.attend_out = _joined(attention.o_proj)
        self.mlp_in = _joined(mlp.gate_proj, mlp.up_proj)
        self.mlp_out = _joined(mlp.down_proj)


class _Rows:
    """Memory for the states of B sequences, with rows up to a multiple of ROWS whose results mean nothing."""

    def __init__(self, batch: int, layer: _Layer, hidden_size: int) -> None:
        from stillhouse.student_trainer.train.rollouts.panels_numba import ROWS, padded

        self.batch, self.number = batch, padded(batch, ROWS)

        def empty(width: int) -> NDArray[np.float32]:
            return np.zeros((self.number, width), np.float32)

        self.hidden, self.normed = empty(hidden_size), empty(hidden_size)
        self.hidden_BH = torch.from_numpy(self.hidden)[:batch]
        self.heads = empty(layer.attend_in[1].size)
        self.attended = empty(layer.num_queries * layer.head_dim)
        self.gates = empty(layer.mlp_in[1].size)
        self.added = empty(layer.attend_out[1].size)


def _norm(norm: Any) -> tuple[NDArray[np.float32], np.float32]:
    return _norm_weight(norm), _epsilon(norm)


def _norm_weight(norm: Any) -> NDArray[np.float32]:
    if norm is None:
        return np.zeros(0, np.float32)
    weight: NDArray[np.float32] = norm.weight.detach().numpy()
    return weight


def _epsilon(norm: Any) -> np.float32:
    return np.float32(norm.variance_epsilon)


def _joined(*modules: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Panels of linear layers of one input, side by side."""
    from stillhouse.student_trainer.train.rollouts.panels_numba import panels

    found = [each for each in map(weight_of, modules) if each is not None]
    weight = torch.cat([weight.detach() for weight, _ in found])
    biases = [weight.new_zeros(len(own)) if bias is None else bias.detach() for own, bias in found]
    return panels(weight, torch.cat(biases))
