"""Time to quality, idle shares and stages of a start: arithmetic of the benchmarks, without a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.end_to_end.__main__ import ratios_of, time_to
from benchmarks.end_to_end.arms import ArmResult, Arms
from benchmarks.end_to_end.processes import halves_of_cores, on_cores
from benchmarks.end_to_end.sizes import Sizes, Work
from benchmarks.on_policy.__main__ import ratios_of as on_policy_ratios
from benchmarks.on_policy.idle import Look, idle_shares
from benchmarks.start.timeline import longest, timeline


def arm(name: str, second_each: float, scores: dict[int, float], steps: int = 8) -> ArmResult:
    times = {step: 100 + step * second_each for step in range(1, steps + 1)}
    return ArmResult(name=name, began_s=100.0, steps=times, scores=scores)


def test_time_to_a_score_lies_between_kept_students() -> None:
    found = arm("online", 1.0, {2: 3.0, 4: 2.0, 8: 1.5})
    assert time_to(found, 2.5) == pytest.approx(3.0)
    assert time_to(found, 2.0) == pytest.approx(4.0)
    assert time_to(found, 4.0) == pytest.approx(2.0)
    assert time_to(found, 1.0) is None


def test_an_arm_that_was_cut_short_is_compared_at_the_steps_it_took() -> None:
    online = arm("online", 1.0, {4: 2.0, 8: 1.5})
    ratios = ratios_of(
        [online, arm("trl-local", 3.0, {4: 2.0, 8: 1.5}), arm("trl-server", 10.0, {2: 2.0}, steps=2)]
    )
    assert ratios["trl-local_over_online_seconds_at_equal_steps"] == pytest.approx(3)
    assert ratios["trl-local_over_online_seconds_to_its_final_kl"] == pytest.approx(3)
    assert ratios["trl-server_over_online_seconds_at_equal_steps"] == pytest.approx(10)
    assert ratios["trl-server_over_online_seconds_to_its_final_kl"] == pytest.approx(20 / 4)
    assert "online_over_cached_seconds" not in ratios
    assert ratios_of([online, ArmResult(name="trl-local", problem="it did not start")]) == {}


def test_a_score_that_equal_steps_miss_is_timed_in_a_longer_run() -> None:
    trl = arm("trl-local", 3.0, {4: 2.0, 8: 1.5})
    behind, longer = (
        arm("online", 1.0, {4: 2.1, 8: 1.6}),
        arm("online-longer", 1.0, {4: 2.1, 9: 1.4}, steps=9),
    )
    name = "trl-local_over_online_seconds_to_its_final_kl"
    assert name not in ratios_of([behind, trl])
    assert ratios_of([behind, longer, trl])[name] == pytest.approx(24 / (4 + 5 * 0.6 / 0.7))


def test_a_later_call_reports_the_arms_of_earlier_ones(tmp_path: Path) -> None:
    arms = Arms(work=Work(tmp_path), sizes=Sizes(), peers=None, minutes=1.0, say=print)
    kept = arm("online", 1.0, {4: 2.0, 8: 1.5})
    kept.memory_mib = [("train", 400.0)]
    arms.keep(kept)
    assert arms.earlier("online") == kept
    assert arms.earlier("cached") is None


def test_hosts_apart_have_half_of_the_cores_each_and_results_of_their_own(tmp_path: Path) -> None:
    work, sizes = Work(tmp_path), Sizes()
    apart = replace(sizes, apart=True)
    work.mark_ready(sizes)
    assert work.fits(apart)
    assert work.arm("online", apart) != work.arm("online", sizes)
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("one core cannot be halved")
    student, services = map(set, halves_of_cores())
    assert student | services == mine
    assert not student & services
    with on_cores(services):
        seen = subprocess.check_output([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"])
    assert seen.decode().strip() == str(services)
    assert os.sched_getaffinity(0) == mine


def test_updates_a_minute_are_compared_for_the_same_weights() -> None:
    ratios = on_policy_ratios(
        [arm("local", 1.0, {8: 2.0}), arm("trl-gkd", 2.5, {8: 2.1}), arm("one-service", 1.0, {})]
    )
    assert ratios == {
        "local_over_trl-gkd_updates_a_minute": pytest.approx(2.5),
        "local_minus_trl-gkd_reverse_kl": pytest.approx(-0.1),
    }


def test_seeds_of_an_arm_are_compared_one_by_one_and_kept(tmp_path: Path) -> None:
    ours, theirs = arm("local", 1.0, {8: 2.0}), arm("trl-gkd", 2.0, {8: 2.1})
    ours.others = [arm("local, seed 1", 1.0, {8: 2.4})]
    theirs.others = [arm("trl-gkd, seed 1", 2.0, {8: 2.7})]
    ratios = on_policy_ratios([ours, theirs])
    assert ratios["local_minus_trl-gkd_reverse_kl"] == pytest.approx(-0.2)
    assert ratios["local_minus_trl-gkd_reverse_kl_standard_error"] == pytest.approx(0.1)
    arms = Arms(work=Work(tmp_path), sizes=Sizes(), peers=None, minutes=1.0, say=print)
    arms.keep(ours)
    assert arms.earlier("local") == ours


def test_a_folder_fits_any_precision_and_as_many_seeds_as_it_was_made_for(tmp_path: Path) -> None:
    work, made = Work(tmp_path), Sizes(seeds=3)
    assert not work.fits(made)
    work.mark_ready(made)
    assert work.fits(replace(made, seeds=1, seed=2, precision="bf16"))
    assert not work.fits(replace(made, seeds=4))
    assert not work.fits(replace(made, vocabulary=32_000))


def test_idle_time_counts_from_the_first_text_of_any_service_to_the_last() -> None:
    never = [Look(0.0, 0.0), Look(10.0, 0.0)]
    early = [Look(0.0, 2.0), Look(1.0, 2.5), Look(5.0, 6.5), Look(10.0, 6.5)]
    late = [Look(0.1, 0.0), Look(5.1, 4.0), Look(9.9, 8.0), Look(10.4, 8.1)]
    # From 0.5, where the early one begins, to 10.0, where the late one ends.
    assert idle_shares([early, late]) == pytest.approx([1 - 4.5 / 9.5, 1 - 8.1 / 9.5])
    assert idle_shares([early, never]) == pytest.approx([0.0, 1.0])
    assert idle_shares([never]) == []


def test_a_starts_stages_end_with_lines_of_its_log() -> None:
    lines = [
        json.dumps({"ts": f"2026-01-01T00:00:0{second}.5Z", "event": event})
        for second, event in ((1, "data read"), (4, "training"))
    ]
    log = "\n".join([lines[0], "a library's line 2026-01-01", lines[1], "{}"])
    began_s = 1767225600.0
    stages = timeline(log, began_s, began_s + 5, "first step")
    assert [each.name for each in stages] == ["data read", "training", "first step"]
    assert [each.seconds for each in stages] == pytest.approx([1.5, 3.0, 0.5])
    assert [each.name for each in longest(stages)] == ["training"]
    assert timeline(log, began_s + 2, began_s + 5, "first step")[0].name == "training"
