"""Texts from a service on the student's base: written by the version that their name says, and as likely as the student finds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file

from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoRequest
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.train.rollouts.adapter_files import _folder
from tests.conftest import Models
from tests.student_trainer.train.runs import (
    events,
    failure,
    finish_here,
    make_run,
    metric,
    spec_of,
)
from tests.support.networks.endless_teacher import Change, EndlessTeacher, without_end
from tests.support.networks.tcp_proxy import TcpProxy
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher

STEPS = 3


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that were sent to `writer`."""
    return tmp_path_factory.mktemp("uploads")


@contextmanager
def _writer(model: Path, directory: Path, *options: str) -> Iterator[Program]:
    shared = ["--dtype", "float32", "--threads", "1", "--max-adapters", "2"]
    with (
        no_process_left() as mark,
        start_teacher(
            model, engine="hf", directory=directory, options=[*shared, *options], environment=mark
        ) as program,
    ):
        yield program


@pytest.fixture(scope="module")
def writer(models: Models, uploads: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service on the student's base."""
    with _writer(models.student, tmp_path_factory.mktemp("writer"), "--upload-dir", str(uploads)) as program:
        yield program


def _spec(models: Models, data: Path, teacher: str, target: str, **context: Any) -> dict[str, Any]:
    term = {"divergence": "reverse_kl", "estimator": "policy_gradient"}
    source = {
        "generation": {"max_new_tokens": 6, "samples_per_prompt": 2},
        "min_teacher_logprob": -1000,
        "rollout_target": target,
        **context,
    }
    return spec_of(
        models.student,
        data,
        teacher,
        student={"model": str(models.student), "lora": {"rank": 4}, "output": "adapter"},
        optimizer={"max_steps": STEPS, "grad_accum_steps": 1, "micro_batch_size": 4, "learning_rate": 1e-2},
        contexts=[{"student": source, "loss": {"terms": [term], "top_k": 8}}],
    )


@pytest.mark.parametrize("staleness", [0, 1])
def test_every_version_writes_by_itself_and_leaves_nothing_behind(
    *,
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    writer: Program,
    tmp_path: Path,
    staleness: int,
) -> None:
    spec = _spec(models, dataset_file, hf_teacher.target, writer.target, max_staleness=staleness)
    run_dir = make_run(tmp_path, f"remote-{staleness}", spec)
    assert finish_here(run_dir) == 0, events(run_dir)
    weights = metric(run_dir, "train/importance_weight")
    ages = metric(run_dir, "train/rollout_staleness")
    assert [ages[step] for step in range(1, STEPS + 1)] == [0, *[staleness] * (STEPS - 1)]
    for step, weight in weights.items():
        # A fresh text is exactly as likely as the student finds it: it was written by these very weights.
        assert (weight == pytest.approx(1, abs=1e-4)) == (ages[step] == 0)
    with grpc.insecure_channel(writer.target) as channel:
        info = TeacherServiceStub(channel).GetTeacherInfo(GetTeacherInfoRequest())
    assert not info.adapters


def test_a_service_on_another_base_is_refused(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    run_dir = make_run(
        tmp_path, "another-base", _spec(models, dataset_file, hf_teacher.target, hf_teacher.target)
    )
    assert finish_here(run_dir) == EXIT_FAILED
    assert "cannot be loaded: size mismatch" in failure(run_dir)


def _repeated(_answer: object) -> None:
    """Whole texts, again and again."""


@pytest.mark.parametrize("change", [without_end, _repeated], ids=["parts", "repeated"])
def test_endless_texts_of_a_service_end_a_run(
    *,
    change: Change,
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    writer: Program,
    tmp_path: Path,
) -> None:
    with EndlessTeacher(writer.target, change) as endless:
        spec = _spec(models, dataset_file, hf_teacher.target, endless.target)
        run_dir = make_run(tmp_path, "endless", spec)
        assert finish_here(run_dir) == EXIT_FAILED
    said = "or had ended" if change is _repeated else "of one text; at most 6 were asked for"
    assert said in failure(run_dir)


@pytest.fixture(scope="module")
def alone(
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    writer: Program,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunDir:
    """A whole run whose texts one service writes."""
    spec = _spec(models, dataset_file, hf_teacher.target, writer.target)
    run_dir = make_run(tmp_path_factory.mktemp("alone"), "alone", spec)
    assert finish_here(run_dir) == 0, events(run_dir)
    return run_dir


def test_a_service_on_this_machine_reads_adapters_where_they_are(alone: RunDir, uploads: Path) -> None:
    assert len(metric(alone, "train/loss")) == STEPS
    assert not list(uploads.iterdir())


def test_a_run_tells_how_long_its_service_had_nothing_to_write(alone: RunDir) -> None:
    assert set(metric(alone, "train/rollout_services").values()) == {1}
    idle = metric(alone, "train/rollout_idle")
    # Not of the first step, before which services wait for the run to be ready.
    assert list(idle) == list(range(2, STEPS + 1))
    assert all(0 <= share <= 1 for share in idle.values())
    assert any(idle.values())


def test_a_service_that_may_not_read_them_gets_them_sent(
    *, models: Models, dataset_file: Path, hf_teacher: Program, alone: RunDir, tmp_path: Path
) -> None:
    roots = "--allow-root", str(tmp_path / "other"), "--upload-dir", str(tmp_path / "uploads")
    with _writer(models.student, tmp_path / "writer", *roots) as program:
        run_dir = make_run(tmp_path, "sent", _spec(models, dataset_file, hf_teacher.target, program.target))
        assert finish_here(run_dir) == 0, events(run_dir)
    assert list((tmp_path / "uploads").iterdir())
    _assert_same_adapter(run_dir, alone)


def test_adapters_go_to_a_disk_where_memory_has_no_room(tmp_path: Path) -> None:
    assert _folder(tmp_path, 0) == tmp_path
    assert _folder(tmp_path, 1 << 60) is None
    assert _folder(tmp_path / "missing", 0) is None


def test_a_stop_keeps_what_a_service_is_writing(
    *, models: Models, dataset_file: Path, hf_teacher: Program, writer: Program, alone: RunDir, tmp_path: Path
) -> None:
    spec = _spec(models, dataset_file, hf_teacher.target, writer.target)
    run_dir = make_run(tmp_path, "stopped", spec)
    assert finish_here(run_dir, stopped=lambda: bool(metric(run_dir, "train/loss"))) == 0
    assert 0 < len(metric(run_dir, "train/loss")) < STEPS
    assert finish_here(run_dir, 2) == 0, events(run_dir)
    _assert_same_adapter(run_dir, alone)
    assert metric(run_dir, "train/rollout_staleness") == metric(alone, "train/rollout_staleness")


def test_services_share_the_writing_and_one_that_is_lost_leaves_its_part(
    *, models: Models, dataset_file: Path, hf_teacher: Program, writer: Program, alone: RunDir, tmp_path: Path
) -> None:
    with TcpProxy(writer.target) as network:
        targets = {"rollout_targets": [writer.target]}
        spec = _spec(models, dataset_file, hf_teacher.target, network.target, **targets)
        run_dir = make_run(tmp_path, "shared", spec)
        carried: list[int] = []

        def cut_after_a_step() -> bool:
            if not carried and metric(run_dir, "train/loss"):
                carried.append(network.num_bytes)
                network.become("cut")
            return False

        assert finish_here(run_dir, stopped=cut_after_a_step) == 0, events(run_dir)
    assert carried[0] > 3_000, "it had its part"
    _assert_same_adapter(run_dir, alone)


def _assert_same_adapter(found: RunDir, expected: RunDir) -> None:
    assert metric(found, "train/loss") == metric(expected, "train/loss")
    weights, others = (load_file(each.final_path / "adapter_model.safetensors") for each in (found, expected))
    for name, weight in others.items():
        np.testing.assert_array_equal(weights[name], weight, err_msg=name)
