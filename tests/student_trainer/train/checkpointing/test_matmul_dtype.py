"""A run keeps its matmul dtype: no resume, host or process chooses again, and its checkpoints carry it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.student_trainer.config.settled.matmul_dtype import Processor, matmul_dtype
from stillhouse.student_trainer.run_dir import MANIFEST, RunDir
from tests.conftest import Models
from tests.student_trainer.train.runs import assert_same_end, finish, finish_here, make_run, metric, spec_of
from tests.support.processes import no_process_left

STEPS = 4
HERE = matmul_dtype("bfloat16", Processor.read())
"""The choice of this host."""
(OTHER,) = {"bfloat16", "float32"} - {HERE}
"""That of a host with other flags."""

Make = Callable[..., RunDir]


@pytest.fixture
def make(models: Models, dataset_file: Path, tmp_path: Path) -> Make:
    """A run in bf16 without a teacher; `created_on` the host whose service has settled it, None before it had the setting."""

    def make_one(name: str, created_on: str | None) -> RunDir:
        optimizer = {"precision": "bf16", "max_steps": STEPS, "name": "sgd", "learning_rate": 0.1}
        run_dir = make_run(
            tmp_path,
            name,
            spec_of(
                models.student,
                dataset_file,
                None,
                optimizer=optimizer,
                loss={"terms": [{"weight": 0}], "hard_weight": 1.0},
                checkpoint={"every_steps": 2, "keep": 10},
            ),
        )
        settle(run_dir, created_on)
        return run_dir

    return make_one


def settle(run_dir: RunDir, dtype: str | None, *, by_user: bool = False, num_processes: int = 1) -> None:
    """Writes `dtype` into the effective spec, and as a user's own value into the spec as well."""
    for path in (run_dir.effective_spec_path, *([run_dir.spec_path] if by_user else [])):
        spec: dict[str, Any] = json.loads(path.read_text())
        spec["optimizer"].pop("matmul_dtype", None)
        spec["optimizer"] |= {"matmul_dtype": dtype} if dtype else {}
        spec["resources"] = {**spec.get("resources", {}), "num_processes": num_processes}
        path.write_text(json.dumps(spec))


def carried(run_dir: RunDir) -> dict[int, str]:
    """The type in each checkpoint, by step."""
    return {
        step: json.loads((run_dir.checkpoint_path(step) / MANIFEST).read_text())["matmul_dtype"]
        for step in run_dir.checkpoints()
    }


def stop_after(run_dir: RunDir, step: int) -> None:
    """The first attempt, until it has taken `step`."""
    assert finish_here(run_dir, stopped=lambda: len(metric(run_dir, "train/loss")) >= step) == 0
    assert run_dir.checkpoints() == [step]


def test_a_run_computes_in_the_type_of_its_spec_on_any_host(make: Make) -> None:
    ends = {}
    for dtype in (HERE, OTHER):
        ends[dtype] = make(dtype, dtype)
        assert finish_here(ends[dtype]) == 0
        assert carried(ends[dtype]) == {2: dtype, 4: dtype}
    assert metric(ends[HERE], "train/loss") != metric(ends[OTHER], "train/loss")


@pytest.mark.parametrize("lost", [None, HERE])
def test_a_resume_on_another_host_keeps_the_type_of_the_checkpoint(make: Make, lost: str | None) -> None:
    """Also where the effective spec is older than the setting, or says what the other host would choose."""
    whole, resumed = make("whole", OTHER), make("resumed", OTHER)
    assert finish_here(whole) == 0
    stop_after(resumed, 2)
    settle(resumed, lost)
    assert finish_here(resumed, 2) == 0
    assert carried(resumed) == {2: OTHER, 4: OTHER}
    assert_same_end(resumed, whole)


def test_a_run_older_than_the_setting_chooses_once(make: Make) -> None:
    run_dir = make("old", None)
    stop_after(run_dir, 2)
    manifest = run_dir.checkpoint_path(2) / MANIFEST
    content = json.loads(manifest.read_text())
    assert content.pop("matmul_dtype") == HERE
    manifest.write_text(json.dumps(content))
    assert finish_here(run_dir, 2) == 0
    assert json.loads((run_dir.checkpoint_path(4) / MANIFEST).read_text())["matmul_dtype"] == HERE


def test_a_type_that_the_user_changes_wins_over_the_checkpoint(make: Make) -> None:
    run_dir = make("changed", OTHER)
    stop_after(run_dir, 2)
    settle(run_dir, HERE, by_user=True)
    assert finish_here(run_dir, 2) == 0
    assert carried(run_dir) == {2: OTHER, 4: HERE}


def test_all_processes_compute_in_the_type_of_the_first(make: Make) -> None:
    """It alone has read the checkpoint when the type is told; by the spec the second one would choose another."""
    run_dir = make("ranks", OTHER)
    stop_after(run_dir, 2)
    settle(run_dir, None, num_processes=2)
    with no_process_left() as mark:
        assert finish(run_dir, 2, environment=mark) == 0
    lines = [line for line in run_dir.log_path(2).read_text().splitlines() if "matmuls of the loss" in line]
    assert len(lines) == 2
    assert all(OTHER in line for line in lines)
    assert carried(run_dir) == {2: OTHER, 4: OTHER}
