"""Continuous batching: sequences of unequal length decode together, and those that end make room for the next ones.

For models whose memory is keys and values of whole sequences alone. Rows are aligned at their last token, with padding on
the left. Axes: B sequences, L keys, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

_GROWTH = 64
"""Tokens by which buffers of keys grow at least."""
_REFILL_SHARE = 4
"""Sequences are added once this part of the batch is free: each addition copies all keys."""
_DROP_SHARE = 8
"""Ended sequences leave the batch once they are this part of it, for the same reason."""


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A sequence to continue."""

    prompt: NDArray[np.int32]
    """[P], P >= 1; sequences that share the very array share its first pass."""
    room: int
    """Tokens that may follow, at least 1."""

    @property
    def length(self) -> int:
        """Tokens of prompt and continuation at most."""
        return len(self.prompt) + self.room


Draw = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps the rows [B], the places [B] of their next tokens, from 0 on, and logits [B, V] to tokens int64 [B].

A row that has ended may still be asked for further tokens, which count for nothing.
"""


def supports(model: Any) -> bool:
    """True if a causal model's memory is keys and values of whole sequences, by its configuration."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def decode(
    model: Any,
    rows: Sequence[DecodeRow],
    draw: Draw,
    *,
    end_ids: Sequence[int],
    max_rows: int,
    max_tokens: int | None,
    device: torch.device,
) -> list[int]:
    """Continues each row until one of `end_ids` or its room ends it; returns their numbers of new tokens.

    At most `max_rows` are in the batch at a time, or as many as have `max_tokens` tokens if they are all as long as they
    may become, and one at least. The outcome is a function of the arguments.
    """
    limits: dict[str, Any] = {"max_rows": max_rows, "max_tokens": max_tokens, "device": device}
    return _Decoding(model, rows, draw, set(end_ids), **limits).run()


class _KvLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in buffers with room for more tokens, so that a token copies itself alone."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self._buffers = [self.keys, self.values]
        length, new = self.keys.shape[-2], key_states.shape[-2]
        if length + new > self._buffers[0].shape[-2]:
            size = length + new + max(_GROWTH, length // 2)
            self._buffers = [_longer(each, length, size) for each in self._buffers]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length : length + new] = states
        self.keys, self.values = (each[:, :, : length + new] for each in self._buffers)
        return self.keys, self.values

    def select(self, rows: Tensor, length: int) -> None:
        """Keeps `rows`, each with its last `length` tokens."""
        first = self.keys.shape[-2] - length
        self._set([each[:, :, first:].index_select(0, rows) for each in (self.keys, self.values)])

    def join(self, other: _KvLayer, length: int) -> None:
        """Adds the rows of `other`; both get padding up to `length` tokens."""
        pairs = ((self.keys, other.keys), (self.values, other.values))
        self._set([torch.cat([_padded(each, length) for each in pair]) for pair in pairs])

    def _set(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers
        self.keys, self.values = buffers


def _padded(states: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))


def _longer(states: Tensor, length: int, size: int) -> Tensor:
    longer = states.new_empty((*states.shape[:2], size, states.shape[-1]))
    longer[:, :, :length] = states[:, :, :length]
    return longer


@dataclass(slots=True)
class _Batch:
    """Rows that decode together."""

    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each row, its next input included; a row that has ended stays as long as it is."""
    alive: list[bool] = field(default_factory=list)
    layers: list[_KvLayer] = field(default_factory=list)
    inputs: Tensor | None = None
    """int64 [B]: each row's last token, whose keys are not there yet."""

    @property
    def ended(self) -> int:
        return len(self.rows) - sum(self.alive)


class _Decoding:
    """One call of `decode`."""

    def __init__(
        self,
        model: Any,
        rows: Sequence[DecodeRow],
        draw: Draw,
        end_ids: set[int],
        *,
        max_rows: int,
        max_tokens: int | None,
        device: torch.device,
    ) -> None:
        self._model, self._rows, self._draw, self._end_ids = model, rows, draw, end_ids
        self._max_rows, self._max_tokens, self._device = max_rows, max_tokens, device
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        taken = inspect.signature(plain.forward).parameters
        self._takes_positions = "position_ids" in taken
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._counts = [0] * len(rows)
        # The longest first: rows of like length are in the batch together, and the last ones to end are short.
        order = sorted(range(len(rows)), key=lambda row: -rows[row].length)
        self._waiting = deque(order)

    def run(self) -> list[int]:
        batch = _Batch()
        while self._waiting or batch.rows:
            free = self._limit(batch) - (len(batch.rows) - batch.ended)
            refills = self._waiting and free * _REFILL_SHARE >= self._limit(batch)
            if batch.ended and (refills or batch.ended * _DROP_SHARE >= len(batch.rows)):
                batch = self._kept(batch)
            if self._waiting and (refills or not batch.rows):
                added = self._begin([self._waiting.popleft() for _ in range(min(free, len(self._waiting)))])
                batch = self._joined(batch, added)
            elif batch.rows:
                self._step(batch)
        return self._counts

    def _limit(self, batch: _Batch) -> int:
        """Rows that the batch may have."""
        if self._max_tokens is None:
            return self._max_rows
        longest = max(self._rows[row].length for row in (*batch.rows, *list(self._waiting)[:1]))
        return max(1, min(self._max_rows, self._max_tokens // longest))

    def _begin(self, rows: Sequence[int]) -> _Batch:
        """A batch of new rows: a first pass over their prompts, each of which is computed once, and a first token."""
        places: dict[int, int] = {}
        prompts: list[NDArray[np.int32]] = []
        for row in rows:
            prompt = self._rows[row].prompt
            if id(prompt) not in places:
                places[id(prompt)] = len(prompts)
                prompts.append(prompt)
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), np.int64)
        for place, prompt in enumerate(prompts):
            ids[place, longest - len(prompt) :] = prompt
        layers = [_KvLayer() for _ in DynamicCache(config=self._model.config).layers]
        logits_BV = self._forward(torch.from_numpy(ids).to(self._device), [*map(len, prompts)], layers)
        shared = [places[id(self._rows[row].prompt)] for row in rows]
        if shared != list(range(len(prompts))):
            index = torch.tensor(shared, device=self._device)
            logits_BV = logits_BV.index_select(0, index)
            for layer in layers:
                layer.select(index, longest)
        lengths = [len(self._rows[row].prompt) for row in rows]
        batch = _Batch(rows=[*rows], lengths=lengths, alive=[True] * len(rows), layers=layers)
        self._take(batch, logits_BV)
        return batch

    def _step(self, batch: _Batch) -> None:
        assert batch.inputs is not None
        self._take(batch, self._forward(batch.inputs.unsqueeze(-1), batch.lengths, batch.layers))

    def _forward(self, ids_BT: Tensor, lengths: Sequence[int], layers: Sequence[_KvLayer]) -> Tensor:
        """Logits [B, V] behind the last of the new tokens `ids_BT`; `lengths` are the rows' tokens up to it."""
        num_keys = layers[0].get_seq_length() + ids_BT.shape[1]
        lengths_B1 = torch.tensor(lengths, device=self._device).unsqueeze(-1)
        places_L = torch.arange(num_keys, device=self._device)
        mask_BL = (places_L >= num_keys - lengths_B1).long()
        options = dict(self._options)
        if self._takes_positions:
            positions_BL = (places_L - (num_keys - lengths_B1)).clamp(min=0)
            options["position_ids"] = positions_BL[:, -ids_BT.shape[1] :]
        output = self._model(
            input_ids=ids_BT,
            attention_mask=mask_BL,
            past_key_values=Cache(layers=list(layers)),
            use_cache=True,
            **options,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _take(self, batch: _Batch, logits_BV: Tensor) -> None:
        """Draws a token of each row, which is its next input."""
        starts = [len(self._rows[row].prompt) for row in batch.rows]
        places = [length - start for length, start in zip(batch.lengths, starts, strict=True)]
        rows_B, places_B = (torch.tensor(each, device=self._device) for each in (batch.rows, places))
        batch.inputs = self._draw(rows_B, places_B, logits_BV)
        for number, token in enumerate(batch.inputs.tolist()):
            row = batch.rows[number]
            if batch.alive[number]:
                # An ended row keeps its last position: the next one may be beyond the model's table.
                batch.lengths[number] += 1
                self._counts[row] += 1
                batch.alive[number] = token not in self._end_ids and self._counts[row] < self._rows[row].room

    def _kept(self, batch: _Batch) -> _Batch:
        """The rows that have not ended."""
        places = [place for place, alive in enumerate(batch.alive) if alive]
        if not places:
            return _Batch()
        assert batch.inputs is not None
        index = torch.tensor(places, device=self._device)
        lengths = [batch.lengths[place] for place in places]
        for layer in batch.layers:  # one after the other, so that no second memory is needed
            layer.select(index, max(lengths) - 1)
        return _Batch(
            rows=[batch.rows[place] for place in places],
            lengths=lengths,
            alive=[True] * len(places),
            layers=batch.layers,
            inputs=batch.inputs.index_select(0, index),
        )

    def _joined(self, batch: _Batch, added: _Batch) -> _Batch:
        if not batch.rows:
            return added
        assert batch.inputs is not None
        assert added.inputs is not None
        num_keys = max(*batch.lengths, *added.lengths) - 1
        for old, new in zip(batch.layers, added.layers, strict=True):
            old.join(new, num_keys)
        return _Batch(
            rows=batch.rows + added.rows,
            lengths=batch.lengths + added.lengths,
            alive=batch.alive + added.alive,
            layers=batch.layers,
            inputs=torch.cat([batch.inputs, added.inputs]),
        )
