"""Checks that a model keeps packed sequences apart: several in one row of a forward pass.

Positions restart with each sequence, and the model must mask attention there. Its configuration and modules must show
nothing but attention, and trial batches must agree within what rounding of its numeric type explains: so random first
weights, whose leaks are small, are packed in the same cases as trained ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from stillhouse.protos.errors import first_line
from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.config.settled.micro_batch import auto_tokens
from stillhouse.student_trainer.train.batching.collate import ScoredExample, collate
from stillhouse.student_trainer.train.batching.passes import (
    CPU_PASS_TOKENS,
    GPU_PASS_TOKENS,
    Packing,
    PassCutter,
)
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.student.student import Student, evaluation_mode

log = structlog.get_logger()

MAX_DIFFERENCE = {torch.float32: 1e-4}
"""Largest difference of logits, packed against alone, as a share of their spread, by numeric type."""
MAX_LEAK = {torch.float32: 1e-5}
"""The same when the tokens of the other sequences change: rounding of other orders of the same sums."""
HALF_DIFFERENCE = 0.02
"""Either of them for types of 16 bits."""
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers in which a mask keeps sequences apart."""
FLASH_KERNELS = ("sdpa", "flash", "flex")
"""Beginnings of the names of attention kernels that keep no matrix of weights for the backward pass."""
KERNEL_START_WEIGHTS = 1 << 26
"""Weights of layers in which a token takes as long on a CPU as all starts of a pass's kernels, some four milliseconds."""
ATTENTION_WIDTHS = 6
"""Length of a row, in hidden widths, at which attention takes as long as all other layers: 4 l h against 24 h h."""


def cutter_of(config: RunConfig, student: Student, device: torch.device) -> PassCutter:
    """The cutter of a run's steps, packing included. Raises StillhouseError as `check_packing` does."""
    optimizer, packing = config.optimizer, config.data.packing
    kind: Packing = "never"
    if packing:
        check_packing(student, device)
        kind = "always"
    elif packing is None and not optimizer.cuts_by_rows:
        mixing = _cost(student) or _found_mixing(student, device)
        kind = "never" if mixing else "cheaper"
        log.info("packing", packed="where it is cheaper" if not mixing else f"never: {mixing}")
    on_gpu = device.type != "cpu"
    by_tokens = optimizer.micro_batch_tokens or auto_tokens("gpu" if on_gpu else "cpu")
    return PassCutter(
        max_tokens=None if optimizer.cuts_by_rows else by_tokens,
        max_rows=optimizer.rows_per_pass if optimizer.cuts_by_rows else None,
        packing=kind,
        pass_tokens=GPU_PASS_TOKENS if on_gpu else _cpu_pass_tokens(student),
        attention_tokens=ATTENTION_WIDTHS * student.model.get_input_embeddings().weight.shape[1],  # type: ignore[operator]
    )


def _cpu_pass_tokens(student: Student) -> int:
    """Tokens whose computation takes as long on a CPU as the constant part of a pass.

    A pass writes the gradients of all weights, those of trained embeddings and output layer included, and starts its kernels; a
    token takes what the layers between them take. So a small body under a large vocabulary has few passes.
    """
    tables = {id(each.weight): each.weight for each in _tables(student)}
    others = (each for each in student.plain.parameters() if id(each) not in tables)
    in_layers: int = max(1, sum(each.numel() for each in others))
    in_tables: int = sum(each.numel() for each in tables.values() if each.requires_grad)
    return round(CPU_PASS_TOKENS * (1 + in_tables / in_layers) + KERNEL_START_WEIGHTS / in_layers)


def _tables(student: Student) -> Iterator[Any]:
    """Yields the layers with a row for each token of the vocabulary."""
    for each in (student.plain.get_input_embeddings(), student.plain.get_output_embeddings()):
        if getattr(each, "weight", None) is not None:
            yield each


def check_packing(student: Student, device: torch.device) -> None:
    """Returns if the student computes the same logits for packed sequences as for single ones.

    Raises StillhouseError(INVALID_SPEC) if its attention or state leaks from one sequence into the next.
    """
    mixing = next(_mixing_parts(student, device), None)
    if mixing:
        description = (
            f"{student.config.model} mixes sequences packed into one row: {mixing}. Leave data.packing out."
        )
        raise invalid_field("data.packing", description)


def _found_mixing(student: Student, device: torch.device) -> str | None:
    """Says why the model is not packed unasked; a trial that fails is a reason too."""
    try:
        return next(_mixing_parts(student, device), None)
    except Exception as error:  # models raise whatever their forward passes raise
        return f"a trial of packed sequences failed ({first_line(error)})"


def _cost(student: Student) -> str | None:
    """Says why packing would cost more than it saves, if it would."""
    kernel = str(getattr(_settings(student), "_attn_implementation", None) or "eager")
    if kernel.startswith(FLASH_KERNELS):
        return None
    return f"its attention ({kernel}) keeps a matrix of weights, which packing enlarges"


def _settings(student: Student) -> Any:
    settings: Any = student.plain.config
    return settings.get_text_config() if hasattr(settings, "get_text_config") else settings


def _mixing_parts(student: Student, device: torch.device) -> Iterator[str]:
    """Yields what speaks against packing a model; nothing if trials too show that it keeps sequences apart."""
    settings = _settings(student)
    if getattr(student.plain, "_is_stateful", False):
        yield f"{type(student.plain).__name__} has a recurrent state, which no position resets"
    others = set(getattr(settings, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        yield f"it has layers of the kind {', '.join(sorted(others))}"
    if getattr(settings, "attention_chunk_size", None):
        yield "its attention is cut by places in the row"
    carrying = (nn.Conv1d, nn.Conv2d, nn.RNNBase)
    found = next((name for name, each in student.model.named_modules() if isinstance(each, carrying)), None)
    if found:
        yield f"{found} carries values from token to token"
    if _leaks(student, device):
        yield "the logits of a sequence depend on the tokens of those before it"
    if _differs(student, device):
        yield "its logits differ from those of the sequences alone"


def _trial(student: Student, lengths: Sequence[int], seed: int = 0) -> list[ScoredExample]:
    """Sequences of random tokens, the last one the same for every seed."""
    size = student.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # of transformers' models
    generators = [np.random.default_rng(seed)] * (len(lengths) - 1) + [np.random.default_rng(1)]
    return [
        ScoredExample(
            example=Example(
                token_ids=generator.integers(0, size, length).astype(np.int32),
                mask=np.arange(length) > 0,
                place="a trial sequence",
            ),
            answer=None,
        )
        for length, generator in zip(lengths, generators, strict=True)
    ]


def _logits(
    student: Student, scored: Sequence[ScoredExample], device: torch.device, *, packing: bool
) -> Tensor:
    with evaluation_mode(student.model), torch.no_grad():
        batch = collate(scored, reduction="token_mean", device=device, packing=packing)
        return student.logits(batch).float()


def _differs(student: Student, device: torch.device) -> bool:
    """True if packed sequences have other logits than single ones."""
    scored = _trial(student, (5, 3, 6))
    packed, apart = (_logits(student, scored, device, packing=packing) for packing in (True, False))
    return bool((packed - apart).abs().max() > _limit(MAX_DIFFERENCE, student) * apart.std())


def _leaks(student: Student, device: torch.device) -> bool:
    """True if the logits of a packed sequence depend on the tokens of those before it."""
    own = 5
    one, other = (
        _logits(student, _trial(student, (5, 3, own + 1), seed), device, packing=True)[0, -own:]
        for seed in (2, 3)
    )
    return bool((one - other).abs().max() > _limit(MAX_LEAK, student) * one.std())


def _limit(limits: Mapping[torch.dtype, float], student: Student) -> float:
    weight = student.model.get_input_embeddings().weight  # type: ignore[operator]  # of transformers' models
    return limits.get(weight.dtype, HALF_DIFFERENCE)
