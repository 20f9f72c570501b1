"""Samples completions from the student in the training process, with their exact log-probabilities.

The model runs in continuous batches where its memory allows that, else in those of transformers' `generate`. Every token is
sampled here, so that the recorded log-probability is that of the actual sampling distribution. Axes: B sequences, V
vocabulary, Q top-k ids, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.train.batching.passes import PassCutter
from stillhouse.student_trainer.train.rollouts.continuous_batch import DecodeRow, OnRow, decode
from stillhouse.student_trainer.train.rollouts.generation_mode import GenerationMode, batches, select_mode
from stillhouse.student_trainer.train.rollouts.row_buffer import RowBuffer
from stillhouse.student_trainer.train.rollouts.token_sampler import (
    LARGEST_UNIFORM,
    Recorded,
    TokenRecorder,
    TokenSampler,
)
from stillhouse.student_trainer.train.student.student import Student, evaluation_mode

BATCH_TEXTS = 64
"""Sequences sampled at a time at most."""
SAMPLED_TOKENS = 16
"""Tokens that are sampled at a time, prompts included, for each one of a training pass: keys and values take far less."""
SMALL_MODEL = 2**23
"""Weights of a model up to which one thread writes on a CPU."""
PART_TOKENS = 64
"""Tokens of a sequence, prompt included, after which, and one more, those so far are told: so many take a teacher far longer than a
request. A teacher reads all but the last, and keeps them in whole blocks, whose sizes divide this: it reads none of them again."""
_WORTH_TOKENS = 2**20
"""Constant part of a batch's cost, in tokens, by which fewer batches come before less padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledText:
    """One sampled completion."""

    token_ids: NDArray[np.int32]
    """[n], n >= 1, the end token included if it was sampled."""
    logprobs: NDArray[np.float32]
    """[n]: log-probability of each token under its sampling distribution."""
    likeliest: NDArray[np.int32]
    """[n, Q]: the student's top-k ids at each position, by falling probability."""
    draws: NDArray[np.int32]
    """[n, R]: ids that the student drew from outside its top-k, -1 where it drew none."""
    draw_logprobs: NDArray[np.float32]
    """[n, R]: log of the mean share of each id in the R draws of its position."""
    finished: bool
    """True if it ends with an end token; False if it was truncated."""

    def first(self, num_tokens: int) -> SampledText:
        """The same text as if it had been sampled with room for `num_tokens` >= 1 alone."""
        if len(self.token_ids) <= num_tokens:
            return self
        return SampledText(
            token_ids=self.token_ids[:num_tokens],
            logprobs=self.logprobs[:num_tokens],
            likeliest=self.likeliest[:num_tokens],
            draws=self.draws[:num_tokens],
            draw_logprobs=self.draw_logprobs[:num_tokens],
            finished=False,
        )


OnText = Callable[[int, int, SampledText], object]
"""Is told a prompt's place, the text's among the prompt's, and the text."""


class LocalSampler:
    """Samples completions with the student's current weights, in this process."""

    def __init__(
        self,
        student: Student,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
        vocab_size: int,
        num_likeliest: int,
        num_draws: int = 0,
        pass_tokens: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`autocast` enters the precision in which the student computes; only ids below `vocab_size`, the effective one, are sampled.

        `pass_tokens` reads the present limit of a training pass in tokens, if it has one.
        """
        self._pass_tokens = pass_tokens
        self._student = student
        self._device = device
        self._autocast = autocast
        self._vocab_size = vocab_size
        self._num_likeliest = min(num_likeliest, vocab_size)
        self._num_draws = num_draws
        self._end_ids = sorted(student.end_ids)
        self._mode: GenerationMode | None = None

    def write(
        self,
        prompts: Sequence[NDArray[np.int32]],
        generation: RolloutConfig,
        *,
        max_sequence_tokens: int,
        seeds: Sequence[int],
        on_text: OnText = lambda _prompt, _sample, _text: None,
        on_part: OnText | None = None,
    ) -> list[list[SampledText]]:
        """Samples `samples_per_prompt` completions of each prompt, by the prompt's seed, independently of other prompts.

        Prompt and completion together have at most `max_sequence_tokens`, which leaves every prompt room for a token. `on_text` is
        called for each text, on a CPU in continuous batches while others are still being written; there `on_part` is called before
        with what it has so far, about each time that it has PART_TOKENS more. Raises StillhouseError(NON_FINITE) if the student's logits
        are non-finite.
        """
        texts: dict[int, SampledText] = {}

        def keep(row: int, text: SampledText) -> None:
            texts[row] = text
            on_text(*divmod(row, generation.samples_per_prompt), text)

        def tell(row: int, text: SampledText) -> None:
            if on_part is not None:
                on_part(*divmod(row, generation.samples_per_prompt), text)

        copies = [
            (prompt, np.random.Generator(np.random.PCG64([seed, sample])))
            for prompt, seed in zip(prompts, seeds, strict=True)
            for sample in range(generation.samples_per_prompt)
        ]
        model = self._student.model
        with ExitStack() as stack:
            for context in (
                evaluation_mode(model),
                torch.no_grad(),
                _plain_settings(model),
                _threads_for(model, self._device),
            ):
                stack.enter_context(context)
            self._mode = self._mode or select_mode(model, self._device, self._autocast)
            stack.enter_context(self._autocast())
            if self._mode.batch == "continuous":
                self._write_continuously(
                    copies,
                    generation,
                    max_sequence_tokens,
                    lean=self._mode.lean,
                    keep=keep,
                    tell=None if on_part is None else tell,
                )
                return _grouped(texts, generation.samples_per_prompt)
            lengths = [
                min(len(prompt) + generation.max_new_tokens, max_sequence_tokens) for prompt, _ in copies
            ]
            cutter = self._cutter()
            for group in batches(
                [len(prompt) for prompt, _ in copies],
                self._mode.batch,
                max_new_tokens=generation.max_new_tokens,
                max_positions=self._student.max_positions,
            ):
                for each in cutter.cut([lengths[row] for row in group]):
                    rows = [group[place] for place in each.rows]
                    batch = self._write_batch(
                        [copies[row] for row in rows],
                        generation,
                        max_sequence_tokens,
                        use_cache=self._mode.use_cache,
                    )
                    for row, text in zip(rows, batch, strict=True):
                        keep(row, text)
        return _grouped(texts, generation.samples_per_prompt)

    @property
    def _max_tokens(self) -> int | None:
        """Tokens of a batch at most, prompts included, if there is a limit."""
        tokens = self._pass_tokens()
        return tokens and tokens * SAMPLED_TOKENS

    def _cutter(self) -> PassCutter:
        """Cuts texts into batches: those of like length together, so that few tokens are padding."""
        return PassCutter(max_tokens=self._max_tokens, max_rows=BATCH_TEXTS, pass_tokens=_WORTH_TOKENS)

    def _sampler(self, generation: RolloutConfig) -> TokenSampler:
        return TokenSampler(
            num_valid=self._vocab_size,
            num_likeliest=self._num_likeliest,
            num_draws=self._num_draws,
            generation=generation,
        )

    def _write_continuously(
        self,
        copies: Sequence[tuple[NDArray[np.int32], np.random.Generator]],
        generation: RolloutConfig,
        max_sequence_tokens: int,
        *,
        lean: bool,
        keep: Callable[[int, SampledText], None],
        tell: Callable[[int, SampledText], None] | None,
    ) -> None:
        rows = [
            DecodeRow(prompt, min(generation.max_new_tokens, max_sequence_tokens - len(prompt)))
            for prompt, _ in copies
        ]
        widest = max((row.room for row in rows), default=1)
        uniform_2RT = _uniform([generator for _, generator in copies], [row.room for row in rows], widest)
        decode_rows = partial(
            decode,
            self._student.model,
            rows,
            end_ids=self._end_ids,
            max_rows=BATCH_TEXTS,
            max_tokens=self._max_tokens,
            device=self._device,
            lean=lean,
        )
        if self._device.type == "cpu":
            buffer = RowBuffer(self._sampler(generation), uniform_2RT)

            def told(hear: Callable[[int, SampledText], None]) -> OnRow:
                return lambda row, count: hear(row, self._text(buffer.row(row, count)))

            if tell is None:
                decode_rows(buffer.draw, ended=told(keep))
            else:
                decode_rows(buffer.draw, ended=told(keep), part_tokens=PART_TOKENS, advanced=told(tell))
            return
        recorder, taken = TokenRecorder(self._sampler(generation)), []
        uniform_RT, uniform_tail_RT = torch.from_numpy(uniform_2RT).to(self._device)

        def draw(rows_B: Tensor, places_B: Tensor, logits_BV: Tensor) -> Tensor:
            at = rows_B, places_B.clamp(max=widest - 1)
            taken.append(rows_B)
            return recorder.draw(logits_BV, uniform_RT[at], uniform_tail_RT[at])

        counts = decode_rows(draw)
        for row, text in enumerate(self._collected(counts, taken, recorder) if rows else ()):
            keep(row, text)

    def _collected(
        self, counts: Sequence[int], taken: Sequence[Tensor], recorder: TokenRecorder
    ) -> Iterator[SampledText]:
        """The first tokens of each row, as many as `counts` says, of those that were drawn in order."""
        rows = torch.cat(list(taken)).cpu().numpy()
        order = rows.argsort(kind="stable")
        starts = np.searchsorted(rows[order], np.arange(len(counts)))
        whole = recorder.recorded()
        for start, count in zip(starts.tolist(), counts, strict=True):
            yield self._text(whole.at(order[start : start + count]))

    def _text(self, own: Recorded) -> SampledText:
        # Columns that no position fills would cost as much as the others.
        has_draw = own.draws >= 0
        width = int(has_draw.sum(1).max(initial=0))
        widened = np.float32(math.log(max(1, self._num_draws) / max(1, width))) * has_draw
        return SampledText(
            token_ids=own.tokens,
            logprobs=own.logprobs,
            likeliest=own.likeliest,
            draws=own.draws[:, :width],
            draw_logprobs=(own.draw_logprobs + widened)[:, :width],
            finished=int(own.tokens[-1]) in self._end_ids,
        )

    def _write_batch(
        self,
        copies: Sequence[tuple[NDArray[np.int32], np.random.Generator]],
        generation: RolloutConfig,
        max_sequence_tokens: int,
        *,
        use_cache: bool,
    ) -> Iterator[SampledText]:
        prompts = [prompt for prompt, _ in copies]
        rooms = [min(generation.max_new_tokens, max_sequence_tokens - len(prompt)) for prompt in prompts]
        assert min(rooms) >= 1, "examples end before max_sequence_tokens"
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        widest = max(rooms)
        uniform_2BT = _uniform([generator for _, generator in copies], [widest] * len(copies), widest)
        uniform_BT, uniform_tail_BT = torch.from_numpy(uniform_2BT).to(self._device)
        sampler = _RecordingSampler(self._sampler(generation), uniform_BT, uniform_tail_BT)
        model: Any = self._student.model
        model.generate(
            input_ids=torch.from_numpy(ids).to(self._device),
            attention_mask=torch.from_numpy(mask).to(self._device),
            logits_processor=LogitsProcessorList([sampler]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=widest,
                eos_token_id=self._end_ids or None,
                pad_token_id=self._end_ids[0] if self._end_ids else 0,
                use_cache=use_cache,
            ),
        )
        whole = sampler.recorder.recorded()
        tokens_TB = whole.tokens.reshape(-1, len(prompts))
        for row, room in enumerate(rooms):
            # After the first end token, or at the room, a text ends.
            ends = np.flatnonzero(np.isin(tokens_TB[:room, row], self._end_ids))
            length = int(ends[0]) + 1 if ends.size else min(room, len(tokens_TB))
            yield self._text(whole.at(np.arange(length) * len(prompts) + row))


def _uniform(
    generators: Sequence[np.random.Generator], rooms: Sequence[int], widest: int
) -> NDArray[np.float64]:
    """Numbers of tokens and of draws in [0, LARGEST_UNIFORM], [2, rows, widest]; 0 beyond a row's room."""
    numbers = np.zeros((2, len(rooms), widest))
    for row, (generator, room) in enumerate(zip(generators, rooms, strict=True)):
        for each in numbers:
            each[row, :room] = generator.random(room)
    return numbers.clip(max=LARGEST_UNIFORM)


def _grouped(texts: Mapping[int, SampledText], size: int) -> list[list[SampledText]]:
    """Texts by their prompts, of which each has `size`."""
    return [[texts[row] for row in range(first, first + size)] for first in range(0, len(texts), size)]


@contextmanager
def _threads_for(model: Any, device: torch.device) -> Iterator[None]:
    """Computes with one thread inside the block where the model is so small that a token's products take less than waking another."""
    before = torch.get_num_threads()
    is_small = sum(each.numel() for each in model.parameters()) <= SMALL_MODEL
    if device.type != "cpu" or not is_small or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Replaces a model's saved sampling settings by defaults inside the block."""
    holders = [each for each in (model, getattr(model, "base_model", None)) if each is not None]
    if hasattr(model, "get_base_model"):
        holders.append(model.get_base_model())
    saved = [(each, each.generation_config) for each in holders if hasattr(each, "generation_config")]
    try:
        for each, _ in saved:
            each.generation_config = GenerationConfig()
        yield
    finally:
        for each, settings in saved:
            each.generation_config = settings


class _RecordingSampler(LogitsProcessor):  # type: ignore[misc]
    """Samples and records the token of every sequence, and leaves only it for `generate`, which decodes greedily."""

    def __init__(self, sampler: TokenSampler, uniform_BT: Tensor, uniform_tail_BT: Tensor) -> None:
        """One float64 in [0, 1) for each token, and one for its draws."""
        self.recorder = TokenRecorder(sampler)
        self._uniform_BT, self._uniform_tail_BT = uniform_BT, uniform_tail_BT

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the base class fixes it
        """Returns 0 for the sampled token and -inf elsewhere, [B, V]."""
        at = slice(None), self.recorder.num_positions
        tokens_B = self.recorder.draw(scores, self._uniform_BT[at], self._uniform_tail_BT[at])
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens_B.unsqueeze(-1), 0.0)
