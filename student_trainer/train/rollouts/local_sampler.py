"""Texts that the student writes in the training process: with the tokens as drawn, their exact log-probabilities, and the version that wrote them.

transformers' `generate` carries the model and its cache; every token is drawn here, so that what is recorded as its
log-probability is that of the distribution that it was really drawn from. Axes: B texts, V vocabulary, Q likeliest ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.train.student.student import Student

BATCH_TEXTS = 64
"""Texts that are written side by side."""


class Autocast(Protocol):
    """Enters the precision in which the student computes."""

    def __call__(self) -> AbstractContextManager[object]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """One text that the student wrote behind a prompt."""

    token_ids: NDArray[np.int32]
    """[n], n >= 1, the end token included if it was drawn."""
    logprobs: NDArray[np.float32]
    """[n]: of each token under the distribution that it was drawn from."""
    likeliest: NDArray[np.int32]
    """[n, Q]: the student's likeliest ids at each position, likeliest first."""
    finished: bool
    """Whether it ends with an end token; otherwise it was cut."""


class Sampler:
    """Writes texts with the student's weights as they are."""

    def __init__(
        self,
        student: Student,
        *,
        device: torch.device,
        autocast: Autocast,
        vocab_size: int,
        num_likeliest: int,
    ) -> None:
        """`vocab_size` is the effective vocabulary: only ids below it are drawn."""
        self._student = student
        self._device = device
        self._autocast = autocast
        self._vocab_size = vocab_size
        self._num_likeliest = min(num_likeliest, vocab_size)
        self._end_ids = end_token_ids(student)

    def write(
        self,
        prompts: Sequence[NDArray[np.int32]],
        generation: RolloutConfig,
        *,
        max_sequence_tokens: int,
        seeds: Sequence[int],
    ) -> list[list[Text]]:
        """`samples_per_prompt` texts for each prompt, drawn by the seed of the prompt; who writes beside it changes nothing.

        Prompt and text together have at most `max_sequence_tokens`, which leaves every prompt room for a token. Raises
        StillhouseError(NON_FINITE) if the student's logits are no numbers.
        """
        copies = [
            (prompt, np.random.Generator(np.random.PCG64([seed, sample])))
            for prompt, seed in zip(prompts, seeds, strict=True)
            for sample in range(generation.samples_per_prompt)
        ]
        was_training = self._student.model.training
        self._student.model.eval()
        try:
            with torch.no_grad(), self._autocast(), _plain_settings(self._student.model):
                texts = [
                    text
                    for first in range(0, len(copies), BATCH_TEXTS)
                    for text in self._write_batch(
                        copies[first : first + BATCH_TEXTS], generation, max_sequence_tokens
                    )
                ]
        finally:
            self._student.model.train(was_training)
        size = generation.samples_per_prompt
        return [texts[first : first + size] for first in range(0, len(texts), size)]

    def _write_batch(
        self,
        copies: Sequence[tuple[NDArray[np.int32], np.random.Generator]],
        generation: RolloutConfig,
        max_sequence_tokens: int,
    ) -> Iterator[Text]:
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
        draws = _Draws(
            self._vocab_size,
            generation,
            self._num_likeliest,
            torch.from_numpy(uniform).to(self._device),
        )
        model: Any = self._student.model
        model.generate(
            input_ids=torch.from_numpy(ids).to(self._device),
            attention_mask=torch.from_numpy(mask).to(self._device),
            logits_processor=LogitsProcessorList([draws]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max(rooms),
                eos_token_id=self._end_ids or None,
                pad_token_id=self._end_ids[0] if self._end_ids else 0,
                use_cache=True,
            ),
        )
        tokens, logprobs, likeliest = draws.rows()
        for row, room in enumerate(rooms):
            yield self._cut(tokens[row], logprobs[row], likeliest[row], room)

    def _cut(
        self,
        tokens: NDArray[np.int32],
        logprobs: NDArray[np.float32],
        likeliest: NDArray[np.int32],
        room: int,
    ) -> Text:
        """The text up to its end token, or to `room` tokens."""
        ends = np.flatnonzero(np.isin(tokens[:room], self._end_ids))
        length = int(ends[0]) + 1 if ends.size else min(room, len(tokens))
        return Text(
            token_ids=tokens[:length],
            logprobs=logprobs[:length],
            likeliest=likeliest[:length],
            finished=bool(ends.size),
        )


def end_token_ids(student: Student) -> list[int]:
    """Ids that end a text: the tokenizer's end token, and those that the model itself names."""
    named = getattr(student.plain.generation_config, "eos_token_id", None)
    ids = [student.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({int(each) for each in ids if each is not None})


@contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Keeps the sampling settings that a model was saved with out of `generate`; they come back at the end."""
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


class _Draws(LogitsProcessor):  # type: ignore[misc]
    """Draws the token of every text, records it, and leaves only it for `generate`, which takes the likeliest."""

    def __init__(
        self, num_valid: int, generation: RolloutConfig, num_likeliest: int, uniform_BT: Tensor
    ) -> None:
        """`uniform_BT`: float64 in [0, 1), one number for each draw."""
        self._num_valid = num_valid
        self._generation = generation
        self._num_likeliest = num_likeliest
        self._uniform_BT = uniform_BT
        self._tokens: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._likeliest: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the base class fixes it
        """[B, V]: 0 for the token that was drawn, -inf elsewhere."""
        logits_BV = scores[:, : self._num_valid].float()
        if not bool(torch.isfinite(logits_BV).all()):
            raise StillhouseError(
                Reason.NON_FINITE,
                "The student's logits are no numbers while it writes. Lower optimizer.learning_rate, or use "
                "optimizer.precision: fp32.",
            )
        self._likeliest.append(logits_BV.topk(self._num_likeliest, dim=-1).indices.int())
        logits_BV = logits_BV / self._generation.temperature
        if self._generation.top_p < 1:
            logits_BV = _nucleus(logits_BV, self._generation.top_p)
        logprobs_BV = logits_BV.log_softmax(-1)
        tokens_B1 = _inverse(logprobs_BV, self._uniform_BT[:, len(self._tokens)])
        self._tokens.append(tokens_B1.squeeze(-1).int())
        self._logprobs.append(logprobs_BV.gather(-1, tokens_B1).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens_B1, 0.0)

    def rows(self) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
        """Tokens [B, T], their log-probabilities [B, T] and the likeliest ids [B, T, Q]."""
        parts = (self._tokens, self._logprobs, self._likeliest)
        tokens, logprobs, likeliest = (torch.stack(part, dim=1).cpu().numpy() for part in parts)
        return tokens, logprobs, likeliest


def _inverse(logprobs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B, 1]: the token in whose stretch of the cumulative distribution the number lies; never one of probability 0."""
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    points_B1 = uniform_B.unsqueeze(-1) * cumulative_BV[:, -1:]
    return (cumulative_BV <= points_B1).sum(-1, keepdim=True)


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens whose probability reaches `top_p`; the others become -inf."""
    sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
    probs_BV = sorted_BV.softmax(-1)
    outside_BV = probs_BV.cumsum(-1) - probs_BV >= top_p
    outside_BV[:, 0] = False
    return logits_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, -torch.inf))
