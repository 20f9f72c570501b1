"""A teacher that dies, hangs, is slow, is cut off or comes back as another one: what the run does, and that nothing differs."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.distillation.teacher_proxy import TeacherProxy
from stillhouse.protos.stillhouse.v1.teacher_pb2 import ScoreRequest, ScoreResponse
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from tests.conftest import Models
from tests.faults.disturbed import (
    BATCH,
    KEEPALIVE,
    LONG,
    PREFETCH_STEPS,
    STEPS,
    TOP_K,
    assert_same_end,
    spec,
    wait_for_steps,
    wait_waiting,
)
from tests.faults.world import World, world
from tests.student_trainer.train.runs import (
    assert_ends,
    events,
    failure,
    finish_here,
    make_run,
    metric,
    start,
)
from tests.support.networks.counting_proxy import counting_proxy
from tests.support.networks.tcp_proxy import TcpProxy
from tests.support.processes import no_process_left
from tests.support.programs import Program
from tests.support.runs import wait_until

LONG_SILENCE_S = 60.0


@pytest.fixture
def environment() -> Iterator[Mapping[str, str]]:
    """Environment of training processes that notice a silent teacher soon; none outlives its test."""
    with no_process_left() as mark:
        yield {**mark, **KEEPALIVE}


class Assassin:
    """Kills a teacher at certain answers of its stream, before they reach the trainer; as hooks of a proxy."""

    def __init__(self, here: World, moments: list[int]) -> None:
        self.here = here
        self.moments = moments
        self.num_asked = self.num_answered = 0
        self.killed = threading.Event()
        self.lock = threading.Lock()

    def request(self, request: ScoreRequest) -> None:
        if request.HasField("sequence"):
            with self.lock:
                self.num_asked += 1
                self._kill_at(0)

    def response(self, response: ScoreResponse) -> ScoreResponse:
        with self.lock:
            self.num_answered += sum(result.last for result in response.results)
            self._kill_at(self.num_answered)
        return response

    def _kill_at(self, moment: int) -> None:
        if self.moments and moment >= self.moments[0] and not self.killed.is_set():
            self.moments.pop(0)
            self.here.kill_teacher()
            self.killed.set()


@pytest.mark.faults(row=1)
@pytest.mark.slow
def test_a_teacher_killed_at_any_item_is_asked_again_for_what_is_missing_only(
    *,
    models: Models,
    dataset_file: Path,
    undisturbed: RunDir,
    environment: Mapping[str, str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    total = STEPS * BATCH
    moments = [0, 1, total // 2, total - 1]
    with world(tmp_path, models.teacher) as here:
        here.start_teacher()
        assassin = Assassin(here, list(moments))
        with TeacherProxy(here.teacher_target, lambda: assassin) as proxy:
            run_dir = make_run(tmp_path, "killed", spec(models, dataset_file, proxy.target))
            process = start(run_dir, 1, environment)
            for _ in moments:
                wait_until(lambda: assassin.killed.is_set() or process.poll() is not None, "a kill")
                assert process.poll() is None
                time.sleep(5 if LONG else 0.5)
                here.start_teacher()
                assassin.killed.clear()
            assert_ends(process, run_dir)
    assert_same_end(run_dir, undisturbed)
    again = assassin.num_asked - total
    assert again <= len(moments) * (PREFETCH_STEPS + 1) * BATCH, "answered sequences were asked for again"
    record_property("figure", f"{again} of {total} sequences asked for twice in {len(moments)} deaths")


@pytest.mark.faults(row=3)
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_hung_teacher_is_waited_for_and_goes_on(
    models: Models, dataset_file: Path, undisturbed: RunDir, environment: Mapping[str, str], tmp_path: Path
) -> None:
    with world(tmp_path, models.teacher) as here:
        teacher = here.start_teacher()
        run_dir = make_run(tmp_path, "hung", spec(models, dataset_file, here.teacher_target))
        process = start(run_dir, 1, environment)
        wait_for_steps(run_dir, 3, process)
        teacher.process.send_signal(signal.SIGSTOP)
        try:
            wait_waiting(run_dir, process)
            if LONG:
                time.sleep(LONG_SILENCE_S)
            assert process.poll() is None
            taken = len(metric(run_dir, "train/loss"))
        finally:
            teacher.process.send_signal(signal.SIGCONT)
        assert_ends(process, run_dir)
    assert taken < STEPS
    assert [event["condition"] for event in events(run_dir, "condition")][-1] == ""
    assert_same_end(run_dir, undisturbed)


@pytest.mark.faults(row=4)
@pytest.mark.slow
def test_a_slow_teacher_fills_nothing_up(
    *,
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    undisturbed: RunDir,
    environment: Mapping[str, str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    counting, counts = counting_proxy(hf_teacher.target)
    ahead, sizes = [], []
    with counting, TcpProxy(counting.target, delay_s_per_kib=0.05 if LONG else 0.01) as slow:
        run_dir = make_run(tmp_path, "slow", spec(models, dataset_file, slow.target))
        process = start(run_dir, 1, environment)
        measured = psutil.Process(process.pid)
        wait_for_steps(run_dir, 2, process)
        while process.poll() is None and len(metric(run_dir, "train/loss")) < STEPS:
            taken = len(metric(run_dir, "train/loss"))
            ahead.append(counts.asked(TOP_K) - taken * BATCH)
            sizes.append(measured.memory_info().rss)
            time.sleep(0.1)
        assert_ends(process, run_dir)
        teacher_rss = psutil.Process(hf_teacher.pid).memory_info().rss
    assert max(ahead) <= (PREFETCH_STEPS + 2) * BATCH
    growth = max(sizes) - sizes[0]
    assert growth < 64 * 2**20, f"the training process grew by {growth} bytes"
    waited_s = sum(metric(run_dir, "train/teacher_wait_s").values())
    assert waited_s > 1
    assert "the student waits for its teacher" in run_dir.log_path(1).read_text()
    assert_same_end(run_dir, undisturbed)
    record_property(
        "figure",
        f"{max(ahead)} sequences ahead at most, {growth / 2**20:.1f} MiB grown, {waited_s:.1f} s waited for; "
        f"the teacher holds {teacher_rss / 2**20:.0f} MiB",
    )


@pytest.mark.faults(row=5)
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("weather", ["silent", "cut"])
def test_a_network_that_fails_and_heals_leaves_no_trace(
    *,
    weather: Any,
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    undisturbed: RunDir,
    environment: Mapping[str, str],
    tmp_path: Path,
) -> None:
    with TcpProxy(hf_teacher.target) as network:
        run_dir = make_run(tmp_path, "cut-off", spec(models, dataset_file, network.target))
        process = start(run_dir, 1, environment)
        wait_for_steps(run_dir, 3, process)
        network.become(weather)
        wait_waiting(run_dir, process)
        if LONG:
            time.sleep(30)
        assert process.poll() is None
        network.become("fine")
        assert_ends(process, run_dir)
        assert network.num_connections >= 2
    assert_same_end(run_dir, undisturbed)


@pytest.mark.faults(row=6)
@pytest.mark.slow
@pytest.mark.parametrize("change", ["weights", "adapter", "quantization"])
def test_a_teacher_that_comes_back_as_another_is_refused_amid_the_run(
    change: str, models: Models, dataset_file: Path, environment: Mapping[str, str], tmp_path: Path
) -> None:
    changed = spec(models, dataset_file, f"unix:{tmp_path}/t.sock")
    changed["optimizer"]["max_steps"] = 100_000
    model, before, after = models.teacher, [], []
    if change == "weights":
        model = models.student  # the same tokenizer
    elif change == "adapter":
        before, after = ["--adapter", f"a={models.adapter_a}"], ["--adapter", f"a={models.adapter_b}"]
        changed["teachers"][0]["adapter"] = "a"
    else:
        after = ["--quantization", "bitsandbytes_8bit"]
    with world(tmp_path, models.teacher) as here:
        here.start_teacher(models.teacher, *before)
        run_dir = make_run(tmp_path, "changed", changed)
        process = start(run_dir, 1, environment)
        wait_for_steps(run_dir, 6, process)
        here.kill_teacher()
        here.start_teacher(model, *after)
        assert_ends(process, run_dir, EXIT_FAILED)
    assert "is not the one that this run began with" in failure(run_dir)
    error = events(run_dir, "failed")[-1]["error"]
    assert error["code"] == 9, "FAILED_PRECONDITION"
    assert run_dir.checkpoints()[-1] == max(metric(run_dir, "train/loss"))


@pytest.mark.faults(row=17)
@pytest.mark.parametrize("many", [False, True])
def test_non_finite_answers_are_left_out_counted_and_too_many_end_the_run(
    many: bool, models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    class Damage:
        """Answers NON_FINITE, as a teacher with damaged weights does, for some sequences."""

        def request(self, request: ScoreRequest) -> None:
            pass

        def response(self, response: ScoreResponse) -> ScoreResponse:
            for result in response.results:
                if result.sequence_id % 5 == 0 and (many or result.sequence_id < 10):
                    result.ClearField("distributions")
                    result.error.CopyFrom(damage)
                    result.last = True
            return response

    from stillhouse.protos.errors import Reason, StillhouseError, to_status

    damage = to_status(StillhouseError(Reason.NON_FINITE, "Logits at position 3 are non-finite."))
    with TeacherProxy(hf_teacher.target, Damage) as proxy:
        run_dir = make_run(tmp_path, "damaged", spec(models, dataset_file, proxy.target))
        code = finish_here(run_dir)
    if many:
        assert code == EXIT_FAILED
        assert "are left out" in failure(run_dir)
        assert run_dir.checkpoints()[-1:] == list(metric(run_dir, "train/loss"))[-1:]
    else:
        assert code == 0
        assert len(metric(run_dir, "train/loss")) == STEPS
