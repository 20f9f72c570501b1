"""Checkpoints that a disk has damaged: every file and every kind of damage is noticed, and the newest whole one is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.student_trainer.run_dir import EXIT_FAILED, MANIFEST, RunDir
from stillhouse.student_trainer.train.checkpointing.checkpoint import OPTIMIZER, STATE, find_damage
from tests.conftest import Models
from tests.student_trainer.train.runs import (
    assert_same_end,
    events,
    failure,
    finish_here,
    make_run,
    metric,
    spec_of,
)
from tests.support.programs import Program

STEPS = 12
MODEL = "model.safetensors"
"""The trained weights of a checkpoint, in which all are trained."""
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "middle byte": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x80]) + data[len(data) // 2 + 1 :]
    ),
    "last byte": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut": lambda data: data[: len(data) * 2 // 3],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"\0",
}


@pytest.fixture(scope="module")
def whole(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path_factory: pytest.TempPathFactory
) -> RunDir:
    """A run that is done, with its last four checkpoints."""
    spec = spec_of(
        models.student,
        dataset_file,
        hf_teacher.target,
        data={"eval_fraction": 0},
        optimizer={"max_steps": STEPS, "grad_accum_steps": 1},
        checkpoint={"every_steps": 3, "keep": 4},
    )
    run_dir = make_run(tmp_path_factory.mktemp("whole"), "whole", spec)
    assert finish_here(run_dir) == 0
    assert run_dir.checkpoints() == [3, 6, 9, 12]
    return run_dir


@pytest.mark.faults(row=7)
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_noticed(whole: RunDir, tmp_path: Path, name: str, damage: str) -> None:
    copy = tmp_path / "9"
    shutil.copytree(whole.checkpoint_path(9), copy)
    assert find_damage(copy) is None
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(DAMAGE[damage](data))
    found = find_damage(copy)
    # Spaces and names in the manifest may change without harm; what is checked by it may not.
    if name == MANIFEST and damage in ("middle byte", "longer", "last byte"):
        return
    assert found is not None
    (copy / name).unlink()
    assert find_damage(copy) is not None


@pytest.mark.faults(row=7)
def test_a_run_goes_on_from_the_newest_whole_one_of_several(whole: RunDir, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "runs" / "damaged")
    shutil.copytree(whole.path, run_dir.path)
    shutil.rmtree(run_dir.final_path)
    for step, name, damage in ((12, MODEL, "cut"), (9, OPTIMIZER, "middle byte"), (6, MANIFEST, "empty")):
        path = run_dir.checkpoint_path(step) / name
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert finish_here(run_dir, 2) == 0
    assert events(run_dir, "started")[-1]["step"] == 3
    assert_same_end(run_dir, whole)


@pytest.mark.faults(row=7)
def test_a_run_whose_checkpoints_were_removed_does_not_begin_anew(whole: RunDir, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "runs" / "emptied")
    shutil.copytree(whole.path, run_dir.path)
    shutil.rmtree(run_dir.final_path)
    run_dir.trained_path.unlink()
    shutil.rmtree(run_dir.checkpoint_path(12))
    assert finish_here(run_dir, 2) == 0
    assert events(run_dir, "started")[-1]["step"] == 9  # an older one that is there
    shutil.rmtree(run_dir.checkpoints_path)
    before = len(metric(run_dir, "train/loss"))
    assert finish_here(run_dir, 3) == EXIT_FAILED
    assert "holds no checkpoint, although the run wrote that of step 12: it was removed" in failure(run_dir)
    assert len(metric(run_dir, "train/loss")) == before


@pytest.mark.faults(row=7)
def test_no_whole_one_is_said_and_nothing_is_begun_anew_without_being_asked(
    whole: RunDir, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path / "runs" / "ruined")
    shutil.copytree(whole.path, run_dir.path)
    for step in run_dir.checkpoints():
        path = run_dir.checkpoint_path(step) / STATE
        path.write_bytes(b"")
    before = len(metric(run_dir, "train/loss"))
    assert finish_here(run_dir, 2) == EXIT_FAILED
    assert "No checkpoint" in failure(run_dir)
    assert "begin at step 0" in failure(run_dir)
    assert len(metric(run_dir, "train/loss")) == before
