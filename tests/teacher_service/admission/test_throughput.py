"""Rates of clients are means over the last minute, in bounded memory, and a stranger sees no other's name."""

from __future__ import annotations

import pytest

from stillhouse.teacher_service.admission.throughput import MAX_CLIENTS, OTHERS, SLICE_S, WINDOW_S, Throughput


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_rates_are_means_over_the_window_and_end_with_it() -> None:
    clock = Clock()
    counted = Throughput(clock)
    for _ in range(240):
        clock.now_s += 1
        counted.scored("a", 10)
        counted.generated("b", 3)
    rates = counted.rates()
    assert rates["a"].scored_per_s == pytest.approx(10, rel=SLICE_S / WINDOW_S + 0.02)
    assert (rates["a"].generated_per_s, rates["b"].scored_per_s) == (0, 0)
    assert rates["b"].generated_per_s == pytest.approx(3, rel=SLICE_S / WINDOW_S + 0.02)
    clock.now_s += WINDOW_S
    assert counted.rates() == {}
    assert counted.uptime_s == 300


def test_a_new_service_divides_by_the_time_it_is_up() -> None:
    clock = Clock()
    counted = Throughput(clock)
    counted.scored("a", 100)
    clock.now_s += 10
    assert counted.window_s == 10
    assert counted.rates()["a"].scored_per_s == 10


def test_many_names_take_bounded_memory() -> None:
    counted = Throughput(Clock())
    for number in range(3 * MAX_CLIENTS):
        counted.scored(f"client {number}", 1)
    rates = counted.rates()
    assert len(rates) == MAX_CLIENTS + 1
    assert rates[OTHERS].scored_per_s == 2 * MAX_CLIENTS / SLICE_S
