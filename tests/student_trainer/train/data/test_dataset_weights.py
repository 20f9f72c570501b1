"""Weights of datasets give a run the share of rows that a mixture in a file has."""

from __future__ import annotations

from collections import Counter

import pytest

from stillhouse.client.datasets.mix import _in_ratio
from stillhouse.student_trainer.train.data.schedule import Schedule


@pytest.mark.parametrize(
    ("sizes", "weights"), [((70, 30), (7, 3)), ((100, 100), (70, 30)), ((90, 10), (1, 1))]
)
def test_an_epoch_has_the_share_that_a_mixture_has(sizes: tuple[int, int], weights: tuple[int, int]) -> None:
    num_rows = sum(sizes)
    schedule = Schedule(
        num_rows=num_rows,
        rows_per_step=num_rows,
        num_taken=2 * num_rows,
        seed=1,
        dataset_sizes=sizes,
        weights=weights,
    )
    for epoch in range(2):
        rows = schedule.rows(epoch)
        from_first = sum(row < sizes[0] for row in rows)
        assert [from_first, num_rows - from_first] == _in_ratio(weights, (num_rows, num_rows), num_rows)
        assert max(Counter(rows).values()) <= -(-(num_rows - from_first) // sizes[1]) + 1, (
            "rows repeat in turn"
        )
