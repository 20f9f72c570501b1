"""Memory of a sample between its tokens: the cache that a model takes, if generation with it says what whole passes say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor

from stillhouse.teacher_service.engine import Int32Array
from stillhouse.teacher_service.engines.hf.loading import agree

_log = structlog.get_logger(__name__)
NAMES = ("past_key_values", "cache_params", "state")
"""Names under which models of transformers take and return a cache."""
_PROBES = ((5, 3), (3, 2))
"""Tokens of each probe's prompt, and tokens after it."""


@dataclass(slots=True)
class SampleCache:
    """Cache of one sample: nothing before its first pass, in which the model makes one of its own kind."""

    name: str
    value: Any = None
    """Value that the model returned with the last token."""

    def options(self) -> dict[str, Any]:
        """Arguments of the next pass."""
        return {self.name: self.value, "use_cache": True}

    def keep(self, output: Any) -> None:
        """Keeps what the pass returned."""
        self.value = getattr(output, self.name)


Logits = Callable[[list[Int32Array], int, SampleCache | None], Tensor]
"""Computes [B, keep, V], the logits after the last tokens of sequences of one length; with a cache, after its next tokens."""


def cache_name(model: Any, logits_of: Logits) -> str:
    """Selects the name under which cached generation of interleaved samples agrees with whole passes; empty if none does."""
    vocab_size = model.config.get_text_config().vocab_size
    random = np.random.default_rng(0)
    probes = [random.integers(0, vocab_size, prompt + rest).astype(np.int32) for prompt, rest in _PROBES]
    with torch.inference_mode():
        wholes = [logits_of([ids], rest + 1, None)[0] for ids, (_, rest) in zip(probes, _PROBES, strict=True)]
        last = [
            ids[end - 1 : end]
            for ids, (prompt, rest) in zip(probes, _PROBES, strict=True)
            for end in range(prompt, prompt + rest + 1)
        ]
        forgotten = logits_of(last, 1, None)[:, 0]
        for name in NAMES:
            if name not in inspect.signature(model.forward).parameters:
                continue
            try:
                found = _generated(name, probes, logits_of)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                continue  # a cache that the model does not take so
            if agree(found, torch.cat(wholes), model.dtype, without=forgotten):
                return name
    _log.warning(
        "generates without a cache",
        model=type(model).__name__,
        reason="with one its tokens are not those of whole passes; each token reads all before it",
    )
    return ""


def _generated(name: str, probes: Sequence[Int32Array], logits_of: Logits) -> Tensor:
    """Computes the same rows token by token, the probes in turns: some models keep a state of their own."""
    caches = [SampleCache(name) for _ in probes]
    rows = [
        [logits_of([ids[:prompt]], 1, cache)[0]]
        for ids, cache, (prompt, _) in zip(probes, caches, _PROBES, strict=True)
    ]
    for step in range(max(rest for _, rest in _PROBES)):
        for ids, cache, (prompt, rest), own in zip(probes, caches, _PROBES, rows, strict=True):
            if step < rest:
                own.append(logits_of([ids[prompt + step : prompt + step + 1]], 1, cache)[0])
    return torch.cat([row for own in rows for row in own])
