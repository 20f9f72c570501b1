"""Writes a student's texts for an evaluation: by the run's sampling, or by the student's own generation settings.

Random numbers come from seeds of their own, and torch's generators are put back, so that training does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.train.batching.passes import PassCutter
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.rollouts.generation_mode import (
    GENERATE_MODES,
    GenerationMode,
    batches,
    select_mode,
)
from stillhouse.student_trainer.train.rollouts.local_sampler import BATCH_TEXTS, LocalSampler
from stillhouse.student_trainer.train.student.student import Student, evaluation_mode

MAX_NEW_TOKENS = 512
"""Longest text where the student's own settings name no limit of new tokens."""
_EVALUATION_STREAM = 1 << 80
"""Separates the seeds of these texts from those of rollouts."""


def reference_text(tokenizer: Any, example: Example) -> str:
    """Returns the text of a row's completion, without special tokens."""
    return str(tokenizer.decode(example.token_ids[len(example.prompt) :].tolist(), skip_special_tokens=True))


def text_seed(seed: int, place: int) -> int:
    """Returns the seed of the text for the row at `place` of the held-out rows."""
    return _EVALUATION_STREAM | (seed << 32) | place


class TextWriter:
    """Writes one text for each prompt with the student's present weights."""

    def __init__(
        self,
        student: Student,
        generation: RolloutConfig | None,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
        vocab_size: int,
        seed: int,
    ) -> None:
        """Without `generation` the student's own settings apply; `vocab_size` is the effective vocabulary."""
        self._student = student
        self._generation = generation
        self._device = device
        self._autocast = autocast
        self._seed = seed
        self._mode: GenerationMode | None = None
        self._sampler = LocalSampler(
            student, device=device, autocast=autocast, vocab_size=vocab_size, num_likeliest=1
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling, for the report."""
        if self._generation is None:
            return {"source": "student", **self._student.plain.generation_config.to_diff_dict()}
        plain = self._generation
        return {
            "source": "run",
            "temperature": plain.temperature,
            "top_p": plain.top_p,
            "max_new_tokens": plain.max_new_tokens,
        }

    @property
    def _max_new_tokens(self) -> int:
        """Tokens of a text by the student's own settings."""
        return self._student.plain.generation_config.max_new_tokens or MAX_NEW_TOKENS

    def write(self, examples: Sequence[Example], places: Sequence[int]) -> list[str]:
        """Returns a text for each example's prompt; `places`, those among all held-out rows, decide on the random numbers."""
        prompts = [example.prompt for example in examples]
        seeds = [text_seed(self._seed, place) for place in places]
        if self._generation is None:
            token_ids = self._write_by_own_settings(prompts, seeds)
        else:
            longest = max(map(len, prompts), default=0) + self._generation.max_new_tokens
            written = self._sampler.write(
                prompts,
                self._generation,
                max_sequence_tokens=min(longest, self._student.max_positions or longest),
                seeds=seeds,
            )
            token_ids = [each[0].token_ids.astype(np.int64) for each in written]
        return [
            str(self._student.tokenizer.decode(each.tolist(), skip_special_tokens=True)) for each in token_ids
        ]

    def _write_by_own_settings(
        self, prompts: Sequence[NDArray[np.int32]], seeds: Sequence[int]
    ) -> list[NDArray[np.int64]]:
        model: Any = self._student.model
        texts: dict[int, NDArray[np.int64]] = {}
        cutter = PassCutter(max_rows=BATCH_TEXTS, max_tokens=None)
        devices = [self._device] if self._device.type == "cuda" else []
        with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
            self._mode = self._mode or select_mode(model, self._device, self._autocast, GENERATE_MODES)
            with self._autocast():
                for group in batches(
                    [len(prompt) for prompt in prompts],
                    self._mode.batch,
                    max_new_tokens=self._max_new_tokens,
                    max_positions=self._student.max_positions,
                ):
                    ordered = sorted(group, key=lambda row: len(prompts[row]))
                    for each in cutter.cut([len(prompts[row]) for row in ordered]):
                        rows = [ordered[place] for place in each.rows]
                        torch.manual_seed(seeds[rows[0]] % 2**63)
                        written = self._continue([prompts[row] for row in rows])
                        texts |= zip(rows, written, strict=True)
        return [texts[row] for row in range(len(prompts))]

    def _continue(self, prompts: Sequence[NDArray[np.int32]]) -> list[NDArray[np.int64]]:
        """Continues prompts that share a batch; a text ends with its first end token, or where the model has no more positions."""
        assert self._mode is not None
        model: Any = self._student.model
        end_ids = sorted(self._student.end_ids)
        limit = self._max_new_tokens
        longest = max(map(len, prompts))
        positions = self._student.max_positions
        rooms = [limit if positions is None else min(limit, positions - len(each)) for each in prompts]
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        sequences = model.generate(
            input_ids=torch.from_numpy(ids).to(self._device),
            attention_mask=torch.from_numpy(mask).to(self._device),
            max_new_tokens=max(rooms),
            eos_token_id=end_ids or None,
            pad_token_id=end_ids[0] if end_ids else 0,
            num_return_sequences=1,
            return_dict_in_generate=False,
            use_cache=self._mode.use_cache,
        )
        written = sequences[:, longest:].cpu().numpy()
        return [_cut(row[:room], end_ids) for row, room in zip(written, rooms, strict=True)]


def _cut(token_ids: NDArray[np.int64], end_ids: Sequence[int]) -> NDArray[np.int64]:
    ends = np.flatnonzero(np.isin(token_ids, end_ids))
    return token_ids[: int(ends[0]) + 1] if ends.size else token_ids
