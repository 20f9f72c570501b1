"""Proxies of tests and experiments: counting changes nothing, shuffling permutes complete rows of the selected
streams only."""

from __future__ import annotations

import numpy as np

from benchmarks.distillation.shuffling_proxy import Shuffler
from benchmarks.distillation.teacher_proxy import TeacherProxy
from stillhouse.client.api import Distributions, Teacher
from tests.support.networks.counting_proxy import counting_proxy
from tests.support.programs import Program

SEQUENCES = {0: list(range(5, 45)), 1: list(range(50, 60))}


def scored(target: str, top_k: int) -> dict[object, Distributions]:
    with Teacher(target) as teacher:
        answers = {answer.id: answer for answer in teacher.score(SEQUENCES.items(), top_k=top_k)}
    distributions = {}
    for name, answer in answers.items():
        assert answer.distributions is not None
        distributions[name] = answer.distributions
    return distributions


def test_the_counting_proxy_counts_and_changes_nothing(hf_teacher: Program) -> None:
    proxy, counts = counting_proxy(hf_teacher.target)
    with proxy:
        passed = scored(proxy.target, 8)
    direct = scored(hf_teacher.target, 8)
    assert counts.asked(8) == 2
    assert counts.asked(16) == 0
    for name, rows in direct.items():
        np.testing.assert_array_equal(passed[name].logprobs, rows.logprobs)


def test_the_shuffling_proxy_permutes_complete_rows_of_streams_with_its_top_k(hf_teacher: Program) -> None:
    with TeacherProxy(hf_teacher.target, lambda: Shuffler(top_k=8, seed=1)) as proxy:
        untouched, shuffled = scored(proxy.target, 16), scored(proxy.target, 8)
    direct = scored(hf_teacher.target, 8)
    np.testing.assert_array_equal(untouched[0].logprobs, scored(hf_teacher.target, 16)[0].logprobs)
    for name, rows in direct.items():
        mixed = shuffled[name]
        assert mixed.start == rows.start
        assert not np.array_equal(mixed.target_logprobs, rows.target_logprobs)
        assert table(mixed) == table(rows)


def table(rows: Distributions) -> list[tuple[float, ...]]:
    """Rows in an order independent of their own."""
    whole = np.concatenate(
        [rows.token_ids, rows.logprobs, rows.log_tail[:, None], rows.target_logprobs[:, None]], axis=1
    )
    return sorted(map(tuple, whole.tolist()))
