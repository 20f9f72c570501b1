"""Samples completions from the student in the training process, with their exact log-probabilities.

transformers' `generate` runs the model and its cache; every token is sampled here, so that the recorded log-probability
is that of the actual sampling distribution. Axes: B sequences, V vocabulary, Q top-k ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.train.batching.passes import PassCutter
from stillhouse.student_trainer.train.rollouts.generation_mode import GenerationMode, batches, select_mode
from stillhouse.student_trainer.train.student.student import Student, evaluation_mode

BATCH_TEXTS = 64
"""Sequences sampled at a time at most."""
SAMPLED_TOKENS = 16
"""Tokens that are sampled at a time, prompts included, for each one of a training pass: keys and values take far less."""
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
            finished=False,
        )


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
        self._end_ids = sorted(student.end_ids)
        self._mode: GenerationMode | None = None

    def write(
        self,
        prompts: Sequence[NDArray[np.int32]],
        generation: RolloutConfig,
        *,
        max_sequence_tokens: int,
        seeds: Sequence[int],
    ) -> list[list[SampledText]]:
        """Samples `samples_per_prompt` completions of each prompt, by the prompt's seed, independently of other prompts.

        Prompt and completion together have at most `max_sequence_tokens`, which leaves every prompt room for a token. Raises
        StillhouseError(NON_FINITE) if the student's logits are non-finite.
        """
        copies = [
            (prompt, np.random.Generator(np.random.PCG64([seed, sample])))
            for prompt, seed in zip(prompts, seeds, strict=True)
            for sample in range(generation.samples_per_prompt)
        ]
        model = self._student.model
        with evaluation_mode(model), torch.no_grad(), _plain_settings(model):
            self._mode = self._mode or select_mode(model, self._device, self._autocast)
        with evaluation_mode(model), torch.no_grad(), self._autocast(), _plain_settings(model):
            lengths = [
                min(len(prompt) + generation.max_new_tokens, max_sequence_tokens) for prompt, _ in copies
            ]
            texts: dict[int, SampledText] = {}
            cutter = self._cutter()
            for group in batches([len(prompt) for prompt, _ in copies], self._mode.batch):
                for each in cutter.cut([lengths[row] for row in group]):
                    rows = [group[place] for place in each.rows]
                    written = self._write_batch(
                        [copies[row] for row in rows],
                        generation,
                        max_sequence_tokens,
                        use_cache=self._mode.use_cache,
                    )
                    texts |= zip(rows, written, strict=True)
        size = generation.samples_per_prompt
        return [[texts[row] for row in range(first, first + size)] for first in range(0, len(texts), size)]

    def _cutter(self) -> PassCutter:
        """Cuts texts into batches: those of like length together, so that few tokens are padding."""
        tokens = self._pass_tokens()
        return PassCutter(
            max_tokens=tokens and tokens * SAMPLED_TOKENS, max_rows=BATCH_TEXTS, pass_tokens=_WORTH_TOKENS
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
        uniform = np.stack([generator.random(max(rooms)) for _, generator in copies])
        sampler = _RecordingSampler(
            self._vocab_size,
            generation,
            self._num_likeliest,
            torch.from_numpy(uniform).to(self._device),
        )
        model: Any = self._student.model
        model.generate(
            input_ids=torch.from_numpy(ids).to(self._device),
            attention_mask=torch.from_numpy(mask).to(self._device),
            logits_processor=LogitsProcessorList([sampler]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max(rooms),
                eos_token_id=self._end_ids or None,
                pad_token_id=self._end_ids[0] if self._end_ids else 0,
                use_cache=use_cache,
            ),
        )
        tokens, logprobs, likeliest = sampler.rows()
        for row, room in enumerate(rooms):
            yield self._cut(tokens[row], logprobs[row], likeliest[row], room)

    def _cut(
        self,
        tokens: NDArray[np.int32],
        logprobs: NDArray[np.float32],
        likeliest: NDArray[np.int32],
        room: int,
    ) -> SampledText:
        """Truncates after the first end token, or at `room` tokens."""
        ends = np.flatnonzero(np.isin(tokens[:room], self._end_ids))
        length = int(ends[0]) + 1 if ends.size else min(room, len(tokens))
        return SampledText(
            token_ids=tokens[:length],
            logprobs=logprobs[:length],
            likeliest=likeliest[:length],
            finished=bool(ends.size),
        )


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

    def __init__(
        self, num_valid: int, generation: RolloutConfig, num_likeliest: int, uniform_BT: Tensor
    ) -> None:
        """`uniform_BT`: one float64 in [0, 1) for each token."""
        self._num_valid = num_valid
        self._generation = generation
        self._num_likeliest = num_likeliest
        self._uniform_BT = uniform_BT
        self._tokens: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._likeliest: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the base class fixes it
        """Returns 0 for the sampled token and -inf elsewhere, [B, V]."""
        logits_BV = scores[:, : self._num_valid].float()
        if not bool(torch.isfinite(logits_BV).all()):
            raise StillhouseError(
                Reason.NON_FINITE,
                "The student's logits are non-finite while it samples. Lower optimizer.learning_rate, or use "
                "optimizer.precision: fp32.",
            )
        self._likeliest.append(logits_BV.topk(self._num_likeliest, dim=-1).indices.int())
        logits_BV = logits_BV / self._generation.temperature
        if self._generation.top_p < 1:
            logits_BV = _nucleus(logits_BV, self._generation.top_p)
        logprobs_BV = logits_BV.log_softmax(-1)
        tokens_B1 = _inverse_cdf(logprobs_BV, self._uniform_BT[:, len(self._tokens)])
        self._tokens.append(tokens_B1.squeeze(-1).int())
        self._logprobs.append(logprobs_BV.gather(-1, tokens_B1).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens_B1, 0.0)

    def rows(self) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
        """Returns tokens [B, T], their log-probabilities [B, T] and the top-k ids [B, T, Q]."""
        recorded = (self._tokens, self._logprobs, self._likeliest)
        tokens, logprobs, likeliest = (torch.stack(each, dim=1).cpu().numpy() for each in recorded)
        return tokens, logprobs, likeliest


def _inverse_cdf(logprobs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Samples by the inverse CDF, [B, 1]; never a token of probability 0."""
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    points_B1 = uniform_B.unsqueeze(-1) * cumulative_BV[:, -1:]
    return (cumulative_BV <= points_B1).sum(-1, keepdim=True)


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most probable tokens with mass >= `top_p`; the others become -inf."""
    sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
    probs_BV = sorted_BV.softmax(-1)
    outside_BV = probs_BV.cumsum(-1) - probs_BV >= top_p
    outside_BV[:, 0] = False
    return logits_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, -torch.inf))
