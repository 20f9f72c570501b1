"""Cuts of an update into passes: by tokens, balanced, and without any effect on its gradient."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.student.padding import MAX_RATIO, padding_ratios, row_lengths
from stillhouse.student_trainer.train.batching.passes import PassCutter, deal


@pytest.mark.parametrize("packing", ["never", "cheaper", "always"])
@pytest.mark.parametrize("max_tokens", [1, 300, 1024, 100_000])
def test_every_row_is_in_one_pass_within_the_limit(packing: str, max_tokens: int) -> None:
    lengths = [*row_lengths(40), 2000]
    contexts = [row % 2 for row in range(len(lengths))]
    cutter = PassCutter(max_tokens=max_tokens, packing=packing, attention_tokens=500)  # type: ignore[arg-type]
    passes = cutter.cut(lengths, contexts)
    assert sorted(row for each in passes for row in each.rows) == list(range(len(lengths)))
    for each in passes:
        assert len({contexts[row] for row in each.rows}) == 1
        assert len(each.rows) == 1 or each.computed_tokens(lengths) <= max_tokens
    assert passes == cutter.cut(lengths, contexts)


def test_the_cut_is_the_cheapest_of_all() -> None:
    lengths = [30, 7, 29, 8, 3, 15]
    ordered = sorted(lengths, reverse=True)

    def cost(bounds: tuple[int, ...]) -> float:
        parts = [ordered[begin:end] for begin, end in itertools.pairwise((0, *bounds, len(ordered)))]
        tokens = [len(part) * max(part) for part in parts]
        return (
            np.inf
            if any(each > 64 and len(part) > 1 for each, part in zip(tokens, parts, strict=True))
            else float(sum(tokens) + 9 * len(parts))
        )

    cutter = PassCutter(max_tokens=64, pass_tokens=9)
    found = cutter.cut(lengths)
    bounds = tuple(itertools.accumulate(len(each.rows) for each in found))[:-1]
    every = (each for size in range(6) for each in itertools.combinations(range(1, 6), size))
    assert cost(bounds) == min(map(cost, every))


def test_a_cut_by_rows_keeps_their_order() -> None:
    found = PassCutter(max_rows=3).cut([5, 9, 1, 7], [0, 0, 0, 0])
    assert [list(each.rows) for each in found] == [[0, 1, 2], [3]]


def test_little_is_computed_for_padding() -> None:
    assert np.mean(row_lengths(10_000)) == pytest.approx(187, rel=0.02)
    ratios = padding_ratios()
    assert max(ratios[f"by tokens, {rows} rows"] for rows in (8, 32)) <= MAX_RATIO
    assert min(ratios[f"by rows of 8, {rows} rows"] for rows in (8, 32)) > 1.25


def test_processes_get_equally_many_tokens() -> None:
    lengths = row_lengths(64)
    hands = deal(lengths, 4)
    assert sorted(row for hand in hands for row in hand) == list(range(64))
    tokens = [sum(lengths[row] for row in hand) for hand in hands]
    assert max(tokens) - min(tokens) < max(lengths) / 4
    assert deal(lengths, 1) == [list(range(64))]
    assert deal([3], 2) == [[0], []]


def test_packed_rows_are_weighed_by_their_attention() -> None:
    lengths = row_lengths(16)
    cutter = PassCutter(max_tokens=10_000, packing="cheaper", attention_tokens=1e9)
    assert [each.packed for each in cutter.cut(lengths)] == [True]
    assert not any(each.packed for each in replace(cutter, attention_tokens=50).cut(lengths))
