"""Tokens that forward passes compute over those that are needed, on rows as long as those of question-and-answer data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from stillhouse.student_trainer.config.settled.micro_batch import AUTO_TOKENS
from stillhouse.student_trainer.train.batching.passes import GPU_PASS_TOKENS, PassCutter

MAX_RATIO = 1.10
"""Limit for passes cut by tokens on a CPU, where the constant part of a pass is small."""
LONGEST = 256
NUM_UPDATES = 200
WIDTH = 896
"""Hidden units of the student whose passes are packed, those of Qwen2.5-0.5B."""


def row_lengths(number: int, seed: int = 0) -> list[int]:
    """Lengths with a mean of 187 tokens, cut at LONGEST."""
    generator = np.random.default_rng(seed)
    return [int(each) for each in np.clip(generator.lognormal(5.27, 0.57, number), 16, LONGEST)]


def padding_ratios() -> Mapping[str, float]:
    """Computed over needed tokens by the way in which updates of 8 and of 32 rows are cut."""
    by_tokens = PassCutter(max_tokens=AUTO_TOKENS["cpu"])
    on_gpu = PassCutter(max_tokens=AUTO_TOKENS["gpu"], pass_tokens=GPU_PASS_TOKENS)
    packed = replace(on_gpu, packing="cheaper", attention_tokens=6 * WIDTH)
    cutters = {
        "by rows of 8": PassCutter(max_rows=8),
        "by tokens": by_tokens,
        "by tokens on a GPU": on_gpu,
        "the same, packed": packed,
    }
    return {
        f"{name}, {rows} rows": _ratio(cutter, rows) for name, cutter in cutters.items() for rows in (8, 32)
    }


def _ratio(cutter: PassCutter, rows: int) -> float:
    lengths = row_lengths(rows * NUM_UPDATES)
    computed = 0
    for first in range(0, len(lengths), rows):
        update = lengths[first : first + rows]
        computed += sum(each.computed_tokens(update) for each in cutter.cut(update))
    return computed / sum(lengths)
