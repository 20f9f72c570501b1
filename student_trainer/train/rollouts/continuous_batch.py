"""Continuous batching: sequences of unequal length decode together, and those that end make room for the next ones.

For models whose memory is keys and values of whole sequences alone. Rows are aligned at their last token, with padding on
the left. Axes: B sequences, L keys, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from stillhouse.student_trainer.train.rollouts.compiled_step import CompiledStep, compiles
from stillhouse.student_trainer.train.rollouts.llama_step import LlamaStep

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


OnRow = Callable[[int, int], object]
"""Is told a row and the number of its tokens so far."""


def _ignore(_row: int, _count: int) -> None:
    pass


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
    lean: bool = False,
    ended: OnRow = _ignore,
    part_tokens: int = 0,
    advanced: OnRow = _ignore,
) -> list[int]:
    """Continues each row until one of `end_ids` or its room ends it; returns their numbers of new tokens.

    `ended` is called for each row as soon as it has ended, those of one step in the batch's order, and `advanced` for each that goes
    on and has, with its prompt, one token more than a multiple of `part_tokens`, unless that is 0.

    At most `max_rows` are in the batch at a time, or as many as have `max_tokens` tokens if they are all as long as they
    may become, and one at least. With `lean` the model, for which `llama_step.decodes` must hold, computes tokens beyond the
    prompts by CompiledStep or LlamaStep. The outcome is a function of the arguments.
    """
    limits: dict[str, Any] = {"max_rows": max_rows, "max_tokens": max_tokens, "device": device}
    told: dict[str, Any] = {"ended": ended, "part_tokens": part_tokens, "advanced": advanced}
    return _Decoding(model, rows, draw, end_ids, **limits, lean=lean, **told).run()


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
        new = key_states.shape[-2]
        *buffers, length = self.grow(new)
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, length : length + new] = states
        return self.keys, self.values

    def grow(self, new: int = 1) -> tuple[Tensor, Tensor, int]:
        """Makes room for `new` tokens: the buffers [B, N, size, D], in which the caller has to fill in theirs, and the tokens before."""
        length = self.keys.shape[-2]
        if length + new > self._buffers[0].shape[-2]:
            size = length + new + max(_GROWTH, length // 2)
            self._buffers = [_longer(each, length, size) for each in self._buffers]
        keys, values = self._buffers
        self.keys, self.values = keys[:, :, : length + new], values[:, :, : length + new]
        return keys, values, length

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


@dataclass(kw_only=True, slots=True)
class _Batch:
    """Rows that decode together. Ended rows go on with tokens that count for nothing until they leave."""

    rows: NDArray[np.int64]
    """[B]."""
    padding: NDArray[np.int64]
    """[B]: keys of padding before each row's own."""
    alive: NDArray[np.bool_]
    """[B]."""
    layers: list[_KvLayer]
    inputs: Tensor
    """int64 [B]: each row's last token, whose keys are not there yet."""
    places: _Places | None = None
    """Places of the present rows; None until they are set up."""

    @property
    def ended(self) -> int:
        return len(self.rows) - int(self.alive.sum())

    @property
    def num_keys(self) -> int:
        """Keys of every row, padding included."""
        return int(self.layers[0].get_seq_length())


@dataclass(kw_only=True, slots=True)
class _Places:
    """Places of a batch's rows, on its device; all but the mask are int64 [B]."""

    rows: Tensor
    drawn: Tensor
    """Tokens that each row has drawn."""
    positions: Tensor
    """Positions of the inputs."""
    last: Tensor
    """Last positions that rows may have: a row that has ended waits there, since the next may be beyond the model's table."""
    mask: Tensor | None
    """bool [B, 1, 1, L], True at tokens, for as many keys as the rows may ever have; None if there is no padding."""


class _Decoding:
    """One call of `decode`."""

    def __init__(
        self,
        model: Any,
        rows: Sequence[DecodeRow],
        draw: Draw,
        end_ids: Sequence[int],
        *,
        max_rows: int,
        max_tokens: int | None,
        device: torch.device,
        lean: bool,
        ended: OnRow,
        part_tokens: int,
        advanced: OnRow,
    ) -> None:
        self._model, self._rows, self._draw = model, rows, draw
        self._ended, self._advanced, self._part_tokens = ended, advanced, part_tokens
        self._end_ids = np.array(sorted(end_ids), np.int64)
        self._max_rows, self._max_tokens, self._device = max_rows, max_tokens, device
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        taken = inspect.signature(plain.forward).parameters
        self._takes_positions = "position_ids" in taken
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        longest = max((row.length for row in rows), default=1)
        self._compiled = CompiledStep(model, longest) if lean and compiles(model) else None
        self._lean = LlamaStep(model, longest) if lean and self._compiled is None else None
        self._starts = np.array([len(row.prompt) for row in rows], np.int64)
        self._rooms = np.array([row.room for row in rows], np.int64)
        self._counts = np.zeros(len(rows), np.int64)
        # The longest first: rows of like length are in the batch together, and the last ones to end are short.
        order = sorted(range(len(rows)), key=lambda row: -rows[row].length)
        self._waiting = deque(order)

    def run(self) -> list[int]:
        batch: _Batch | None = None
        limit = self._limit(batch)
        while self._waiting or batch is not None:
            ended, size = (batch.ended, len(batch.rows)) if batch is not None else (0, 0)
            free = limit - (size - ended)
            refills = self._waiting and free * _REFILL_SHARE >= limit
            if batch is not None and ended and (refills or ended * _DROP_SHARE >= size):
                batch = self._kept(batch)
                limit = self._limit(batch)
            if self._waiting and (refills or batch is None):
                added = self._begin([self._waiting.popleft() for _ in range(min(free, len(self._waiting)))])
                batch = added if batch is None else self._joined(batch, added)
                limit = self._limit(batch)
            elif batch is not None:
                self._step(batch)
        return [int(count) for count in self._counts]

    def _limit(self, batch: _Batch | None) -> int:
        """Rows that the batch may have."""
        if self._max_tokens is None:
            return self._max_rows
        present = [] if batch is None else batch.rows.tolist()
        considered = (*present, *list(self._waiting)[:1])
        longest = max((self._rows[row].length for row in considered), default=1)
        return max(1, min(self._max_rows, self._max_tokens // longest))

    def _begin(self, rows: Sequence[int]) -> _Batch:
        """A batch of new rows: a first pass over their prompts, each of which is computed once, and a first token."""
        numbers: dict[int, int] = {}
        prompts: list[NDArray[np.int32]] = []
        for row in rows:
            prompt = self._rows[row].prompt
            if id(prompt) not in numbers:
                numbers[id(prompt)] = len(prompts)
                prompts.append(prompt)
        longest = max(map(len, prompts))
        ids, mask = np.zeros((len(prompts), longest), np.int64), np.zeros((len(prompts), longest), np.bool_)
        for number, prompt in enumerate(prompts):
            ids[number, longest - len(prompt) :] = prompt
            mask[number, longest - len(prompt) :] = True
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        layers = [_KvLayer() for _ in DynamicCache(config=self._model.config).layers]
        logits_BV = self._forward(self._tensor(ids), self._tensor(mask), self._tensor(positions), layers)
        shared = [numbers[id(self._rows[row].prompt)] for row in rows]
        if shared != list(range(len(prompts))):
            index = self._tensor(np.array(shared))
            logits_BV = logits_BV.index_select(0, index)
            for layer in layers:
                layer.select(index, longest)
        batch = _Batch(
            rows=np.array(rows, np.int64),
            padding=longest - self._starts[list(rows)],
            alive=np.ones(len(rows), np.bool_),
            layers=layers,
            inputs=logits_BV.new_zeros(len(rows), dtype=torch.int64),
        )
        self._take(batch, logits_BV)
        return batch

    def _step(self, batch: _Batch) -> None:
        places = self._placed(batch)
        num_keys = batch.num_keys + 1
        if self._compiled is not None:
            logits_BV = self._compiled(batch.inputs, places.positions, batch.padding, batch.layers)
        elif self._lean is not None:
            mask_B11L = None if places.mask is None else places.mask[..., :num_keys]
            logits_BV = self._lean(batch.inputs, places.positions, mask_B11L, batch.layers)
        else:
            positions_B1 = places.positions.unsqueeze(-1)
            mask_BL = torch.arange(num_keys, device=self._device) >= num_keys - 1 - positions_B1
            logits_BV = self._forward(batch.inputs.unsqueeze(-1), mask_BL, positions_B1, batch.layers)
        places.positions = torch.minimum(places.positions + 1, places.last)
        self._take(batch, logits_BV)

    def _forward(
        self, ids_BT: Tensor, mask_BL: Tensor, positions_BT: Tensor, layers: Sequence[_KvLayer]
    ) -> Tensor:
        """Logits [B, V] behind the last of the new tokens `ids_BT`, by the model's own pass."""
        options = dict(self._options)
        if self._takes_positions:
            options["position_ids"] = positions_BT
        output = self._model(
            input_ids=ids_BT,
            attention_mask=mask_BL.long(),
            past_key_values=Cache(layers=list(layers)),
            use_cache=True,
            **options,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _placed(self, batch: _Batch) -> _Places:
        """The tensors of the batch's rows, set up for the next token if the rows are new."""
        if batch.places is None:
            rows, num_keys = batch.rows, batch.num_keys
            mask_B11L = None
            if batch.padding.any():
                longest = num_keys + int((self._rooms - self._counts)[rows].max())
                mask_B11L = self._tensor(np.arange(longest) >= batch.padding[:, None, None, None])
            last = np.maximum(self._starts + self._rooms - 2, 0)[rows]
            batch.places = _Places(
                rows=self._tensor(rows),
                drawn=self._tensor(self._counts[rows]),
                positions=self._tensor(np.minimum(num_keys - batch.padding, last)),
                last=self._tensor(last),
                mask=mask_B11L,
            )
        return batch.places

    def _take(self, batch: _Batch, logits_BV: Tensor) -> None:
        """Draws a token of each row, which is its next input."""
        places = self._placed(batch)
        batch.inputs = self._draw(places.rows, places.drawn, logits_BV)
        places.drawn = places.drawn + 1
        tokens = batch.inputs.cpu().numpy()
        self._counts[batch.rows] += batch.alive
        ends = (tokens[:, None] == self._end_ids).any(1) | (self._counts >= self._rooms)[batch.rows]
        ended_now = batch.rows[batch.alive & ends]
        batch.alive &= ~ends
        for row in ended_now.tolist():
            self._ended(row, int(self._counts[row]))
        if self._part_tokens:
            alive = batch.rows[batch.alive]
            lengths = self._starts[alive] + self._counts[alive]
            for row in alive[(lengths - 1) % self._part_tokens == 0].tolist():
                self._advanced(row, int(self._counts[row]))

    def _kept(self, batch: _Batch) -> _Batch | None:
        """The rows that have not ended."""
        places = np.flatnonzero(batch.alive)
        if not len(places):
            return None
        index = self._tensor(places)
        padding = batch.padding[places]
        trimmed = int(padding.min())
        num_keys = batch.num_keys - trimmed
        for layer in batch.layers:  # one after the other, so that no second memory is needed
            layer.select(index, num_keys)
        return _Batch(
            rows=batch.rows[places],
            padding=padding - trimmed,
            alive=batch.alive[places],
            layers=batch.layers,
            inputs=batch.inputs.index_select(0, index),
        )

    def _joined(self, batch: _Batch, added: _Batch) -> _Batch:
        num_keys = max(batch.num_keys, added.num_keys)
        padding = [each.padding + num_keys - each.num_keys for each in (batch, added)]
        for old, new in zip(batch.layers, added.layers, strict=True):
            old.join(new, num_keys)
        return _Batch(
            rows=np.concatenate([batch.rows, added.rows]),
            padding=np.concatenate(padding),
            alive=np.concatenate([batch.alive, added.alive]),
            layers=batch.layers,
            inputs=torch.cat([batch.inputs, added.inputs]),
        )

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
