"""The teacher is on another host, and the network between fails as networks do: packets vanish, and nobody is told."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from stillhouse.student_trainer.run_dir import RunDir
from tests.conftest import Models
from tests.faults.disturbed import (
    KEEPALIVE,
    LONG,
    STEPS,
    assert_same_end,
    spec,
    wait_for_steps,
    wait_waiting,
)
from tests.student_trainer.train.runs import assert_ends, events, make_run, metric, start
from tests.support.networks.namespaces import Host, other_host
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_program

SILENCE_S = 30.0 if LONG else 5.0
"""Time without a network, after the run has said that it waits."""
SLOW_BITS_PER_S = 64_000 if LONG else 256_000
DIRECT = {"no_proxy": "198.18.0.0/15"}
"""The cable to the other host is no way to the rest of the world."""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Another host, as far as the kernel can tell."""
    with other_host(tmp_path, Path(sys.executable)) as made:
        yield made


@pytest.fixture
def environment() -> Iterator[Mapping[str, str]]:
    """Environment of programs that notice a silent teacher soon; none outlives its test."""
    with no_process_left() as mark:
        yield {**mark, **KEEPALIVE, **DIRECT}


@pytest.fixture
def far_teacher(
    host: Host, models: Models, environment: Mapping[str, str], tmp_path: Path
) -> Iterator[Program]:
    """A teacher on the other host."""
    options = ["--dtype", "float32", "--threads", "1", "--metrics-port", "0", "--insecure"]
    with start_program(
        "teacher",
        [
            "stillhouse.teacher_service",
            "--model",
            str(models.teacher),
            "--engine",
            "hf",
            "--listen",
            f"{host.far}:0",
            *options,
        ],
        directory=tmp_path / "teacher",
        environment=environment,
        python=host.python,
        wait_s=240.0,
    ) as program:
        yield program


CUTS: dict[str, tuple[Callable[[Host], None], Callable[[Host], None]]] = {
    "cable": (Host.pull_cable, Host.plug_cable),
    "answers": (Host.lose_answers, Host.find_answers),
}
"""Ways to take the network away, and to bring it back."""


@pytest.mark.faults(row=5)
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("cut", CUTS)
def test_packets_that_vanish_are_noticed_and_nothing_is_trained_twice_or_skipped(
    *,
    cut: str,
    host: Host,
    far_teacher: Program,
    models: Models,
    dataset_file: Path,
    undisturbed: RunDir,
    environment: Mapping[str, str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """No connection is reset, so a missing answer to a keepalive is the only sign."""
    goes, comes_back = CUTS[cut]
    run_dir = make_run(tmp_path, "cut-off", spec(models, dataset_file, far_teacher.target))
    process = start(run_dir, 1, environment)
    wait_for_steps(run_dir, 3, process)
    goes(host)
    began = time.monotonic()
    wait_waiting(run_dir, process)
    noticed_s = time.monotonic() - began
    time.sleep(SILENCE_S)
    assert process.poll() is None
    taken = len(metric(run_dir, "train/loss"))
    assert taken < STEPS
    comes_back(host)
    began = time.monotonic()
    assert_ends(process, run_dir, within_s=200)
    ended_s = time.monotonic() - began
    assert [event["condition"] for event in events(run_dir, "condition")][-1] == ""
    assert far_teacher.process.poll() is None
    assert_same_end(run_dir, undisturbed)
    record_property(
        "figure",
        f"the run says after {noticed_s:.1f} s that it waits, at step {taken}; "
        f"{ended_s:.1f} s from the network's return to the end at step {STEPS}",
    )


@pytest.mark.faults(row=4)
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_slow_line_costs_time_and_no_memory(
    *,
    host: Host,
    far_teacher: Program,
    models: Models,
    dataset_file: Path,
    undisturbed: RunDir,
    environment: Mapping[str, str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    host.slow_down(SLOW_BITS_PER_S)
    run_dir = make_run(tmp_path, "slow", spec(models, dataset_file, far_teacher.target))
    process = start(run_dir, 1, environment)
    measured, teacher = psutil.Process(process.pid), psutil.Process(far_teacher.pid)
    wait_for_steps(run_dir, 2, process)
    sizes, teacher_sizes = [], []
    while process.poll() is None and len(metric(run_dir, "train/loss")) < STEPS:
        sizes.append(measured.memory_info().rss)
        teacher_sizes.append(teacher.memory_info().rss)
        time.sleep(0.1)
    assert_ends(process, run_dir)
    growth, teacher_growth = (max(each) - each[0] for each in (sizes, teacher_sizes))
    assert growth < 64 * 2**20, f"the training process grew by {growth} bytes"
    assert teacher_growth < 64 * 2**20, f"the teacher grew by {teacher_growth} bytes"
    waited_s = sum(metric(run_dir, "train/teacher_wait_s").values())
    assert waited_s > 1
    assert_same_end(run_dir, undisturbed)
    record_property(
        "figure",
        f"{SLOW_BITS_PER_S / 1e6:g} Mbit/s: {waited_s:.1f} s waited for, {growth / 2**20:.1f} MiB grown in the "
        f"trainer and {teacher_growth / 2**20:.1f} in the teacher",
    )
