"""A model's shapes from its config.json, and its weights counted from them; the weights themselves are never opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.client.core.errors import file_errors, usage_error

MAX_CONFIG_BYTES = 4 * 2**20
_UNGATED = frozenset({"gpt2", "opt", "gpt_neox", "gptj", "gpt_neo", "bloom", "falcon", "phi", "gpt_bigcode"})
"""Families whose feed-forward layers have two matrices; all others have three."""
_NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "vocab": ("vocab_size",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes that memory depends on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    """Width of the feed-forward layer; with experts, of one of them."""
    matrices: int
    """Matrices of a feed-forward layer: 3 if it is gated, else 2."""
    experts: int
    """1 where there are none."""
    active_experts: int
    """Experts that one token passes."""
    vocab: int
    tied: bool
    """True if input and output embeddings share their weights."""

    @classmethod
    def read(cls, model: Path) -> ModelShape:
        """Reads the model directory, or config.json, at `model`.

        Raises:
            StillhouseError: INVALID_REQUEST if it cannot be read or lacks a size.
        """
        path = model / "config.json" if model.is_dir() else model
        with file_errors("read", path), path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES)
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes | str, source: str) -> ModelShape:
        """The sizes in the text of a config.json, which errors call `source`. Raises StillhouseError(INVALID_REQUEST)."""
        try:
            values = json.loads(content)
            values = values.get("text_config", values)
            return cls._from_config(values)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise usage_error(f"{source} does not tell the model's sizes: {error}.") from error

    @classmethod
    def _from_config(cls, values: Mapping[str, Any]) -> ModelShape:
        sizes = {name: _size(values, *spellings) for name, spellings in _NAMES.items()}
        hidden, heads = sizes["hidden"], sizes["heads"]
        kind = str(values.get("model_type", ""))
        experts = int(values.get("num_local_experts") or values.get("num_experts") or 1)
        inner = int(
            (values.get("moe_intermediate_size") if experts > 1 else None)
            or values.get("intermediate_size")
            or values.get("n_inner")
            or 4 * hidden
        )
        shape = cls(
            **sizes,
            kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or hidden // heads),
            inner=inner,
            matrices=2 if kind in _UNGATED else 3,
            experts=experts,
            active_experts=int(values.get("num_experts_per_tok") or 1),
            tied=bool(values.get("tie_word_embeddings", kind in _UNGATED)),
        )
        if min(shape.kv_heads, shape.head_dim, shape.inner, shape.experts, shape.active_experts) < 1:
            raise ValueError("a size is below 1")
        return shape

    @property
    def attention(self) -> int:
        """Weights of one layer's attention."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def feed_forward(self) -> int:
        """Weights of one layer's feed-forward part, with all experts and their router."""
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.matrices * self.hidden * self.inner * self.experts + router

    @property
    def linear(self) -> int:
        """Weights of all layers' matrices, which quantization shrinks."""
        return self.layers * (self.attention + self.feed_forward)

    @property
    def parameters(self) -> int:
        """All weights; biases, which are below a thousandth, left out."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.linear + embeddings + (2 * self.layers + 1) * self.hidden

    def lora(self, rank: int) -> int:
        """Weights of an adapter on every linear layer."""
        wide = self.head_dim * (self.heads + 2 * self.kv_heads)
        attention = 3 * self.hidden + wide + self.hidden + self.heads * self.head_dim
        feed_forward = self.experts * self.matrices * (self.hidden + self.inner)
        return rank * self.layers * (attention + feed_forward)

    def cache_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


def _size(values: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(values.get(name), int) and values[name] > 0:
            return int(values[name])
    raise ValueError(f"it has no {' or '.join(names)}")
