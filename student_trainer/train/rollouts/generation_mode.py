"""Selects how a student generates rollouts: with a cache and padding only where its logits are those of whole passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import structlog
import torch
from torch import Tensor
from transformers import GenerationConfig

from stillhouse.student_trainer.train.rollouts import continuous_batch, llama_step
from stillhouse.student_trainer.train.rollouts.continuous_batch import DecodeRow

log = structlog.get_logger()
_PROBES = (6, 3, 3)
"""Tokens of each probe; the shorter are padded where prompts are."""
_NEW_TOKENS = 4
_TOLERANCE = (1e-3, 1e-5)
_HALF_TOLERANCE = (0.1, 0.03)
"""Shares of the logits' spread: the most by which equal passes of other shapes differ, and what never matters."""


Batch = Literal["continuous", "padded", "equal", "single"]


@dataclass(frozen=True, slots=True)
class GenerationMode:
    """Arguments of generation that must not change what is computed."""

    use_cache: bool
    batch: Batch
    """Prompts that share a pass: all, in continuous batches, or padded on the left; those of one length; or none."""
    lean: bool = False
    """True in continuous batches whose tokens LlamaStep computes."""


GENERATE_MODES = tuple(
    GenerationMode(cache, batch)
    for cache in (True, False)
    for batch in get_args(Batch)
    if batch != "continuous"
)
"""Modes of transformers' `generate`, by rising cost; the last one is a whole pass for each token."""
MODES = (GenerationMode(True, "continuous", lean=True), GenerationMode(True, "continuous"), *GENERATE_MODES)


def batches(
    lengths: Sequence[int], batch: Batch, *, max_new_tokens: int, max_positions: int | None
) -> Iterator[list[int]]:
    """Yields the indices of prompts that share a pass.

    A row goes on until the last of its batch ends. One that could pass `max_positions`, the end of the model's table, until
    then is padded with none of another length.
    """
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        fits = max_positions is None or length + max_new_tokens <= max_positions
        padded = 0 if fits else length
        groups.setdefault({"equal": length, "single": index}.get(batch, padded), []).append(index)
    yield from groups.values()


def select_mode(
    model: Any,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    modes: Sequence[GenerationMode] = MODES,
) -> GenerationMode:
    """Selects the cheapest of `modes`, by rising cost, whose logits agree with passes over whole sequences, by a short trial.

    The trial is in float32 where all weights are, so that rounding does not hide the memory of fresh weights, and a resumed
    run decides as before.
    """
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    is_exact = dtypes <= {torch.float32, torch.float64}
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocab_size, (length,), generator=generator) for length in _PROBES]
    with nullcontext() if is_exact else autocast():
        for mode in modes[:-1]:
            try:
                agrees = _agrees(model, prompts, mode, device, _TOLERANCE if is_exact else _HALF_TOLERANCE)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                agrees = False  # a mode that the model does not take
            if agrees:
                break
        else:
            mode = modes[-1]
    if mode not in {*MODES[:2], GENERATE_MODES[0]}:
        log.warning(
            "rollouts are slower",
            use_cache=mode.use_cache,
            batch=mode.batch,
            reason="with a cache and padded batches this model does not compute what it computes in whole passes",
        )
    return mode


def _agrees(
    model: Any,
    prompts: Sequence[Tensor],
    mode: GenerationMode,
    device: torch.device,
    tolerance: tuple[float, float],
) -> bool:
    lengths = list(map(len, prompts))
    for indices in batches(lengths, mode.batch, max_new_tokens=_NEW_TOKENS, max_positions=None):
        batch = [prompts[each] for each in indices]
        found: Sequence[Tensor] | Tensor
        sequences: Sequence[Tensor] | Tensor
        if mode.batch == "continuous":
            found, sequences = _decode(model, batch, device, lean=mode.lean)
        else:
            found, sequences = _generate(model, batch, mode, device)
        for prompt, found_TV, new in zip(batch, found, sequences, strict=True):
            ids = torch.cat([prompt.to(device), new])[None, :-1]
            rows = slice(len(prompt) - 1, None)
            exact_TV = model(ids, use_cache=False).logits[0, rows].double()
            forgotten_TV = model(ids[0, rows, None], use_cache=False).logits[:, 0].double()
            most, least = tolerance
            spread = float(exact_TV.std(dim=-1).mean())
            limit = min(most * spread, max(0.1 * _error(forgotten_TV, exact_TV), least * spread))
            if not _error(found_TV.double(), exact_TV) <= limit:
                return False
    return True


def _decode(
    model: Any, prompts: Sequence[Tensor], device: torch.device, *, lean: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """As `_generate`, in continuous batches of two sequences, one of which ends first and makes room for the next."""
    if not continuous_batch.supports(model):
        raise ValueError("the model remembers more than keys and values")
    if lean and not llama_step.decodes(model):
        raise ValueError("the model is not shaped like Llama")
    rows = [
        DecodeRow(prompt.int().numpy(), max(1, _NEW_TOKENS - 2 * (number == 0)))
        for number, prompt in enumerate(prompts)
    ]
    logits: defaultdict[int, list[Tensor]] = defaultdict(list)
    tokens: defaultdict[int, list[Tensor]] = defaultdict(list)

    def draw(rows_B: Tensor, _: Tensor, logits_BV: Tensor) -> Tensor:
        likeliest_B = logits_BV.argmax(-1)
        for place, row in enumerate(rows_B.tolist()):
            logits[row].append(logits_BV[place])
            tokens[row].append(likeliest_B[place])
        return likeliest_B

    counts = continuous_batch.decode(
        model, rows, draw, end_ids=[], max_rows=2, max_tokens=None, device=device, lean=lean
    )
    return (
        [torch.stack(logits[row][:count]) for row, count in enumerate(counts)],
        [torch.stack(tokens[row][:count]) for row, count in enumerate(counts)],
    )


def _generate(
    model: Any, prompts: Sequence[Tensor], mode: GenerationMode, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Continues prompts greedily; returns logits [B, T, V] and tokens [B, T]."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in prompts]).long()
    outcome = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=_NEW_TOKENS,
            pad_token_id=0,
            use_cache=mode.use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    return torch.stack(outcome.logits, dim=1), outcome.sequences[:, longest:]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().mean().sqrt())
