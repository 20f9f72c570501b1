"""Several processes of one run: their number changes only the order of sums, and one that dies ends the run with its cause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from stillhouse.protos.evaluation.examples import INDEX
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.train.checkpointing.checkpoint import find_damage
from stillhouse.student_trainer.train.distributed.ranks import merge_metrics
from tests.conftest import Models
from tests.student_trainer.train.runs import (
    events,
    failure,
    final_weights,
    finish,
    finish_here,
    make_run,
    metric,
    spec_of,
    start,
)
from tests.support.processes import no_process_left
from tests.support.programs import Program

STEPS = 4
KEY_BIAS_TOLERANCE = 1e-4
"""Attention hardly sees what all keys have in common, so the gradient of their bias is near 0, and Adam, which divides it by
its own size, makes its rounding larger. A step can change 3e-3."""
DEADLINE_S = 240.0
ROLLOUTS = {"max_new_tokens": 6, "samples_per_prompt": 2}


@pytest.fixture
def spec(models: Models, dataset_file: Path, hf_teacher: Program) -> Callable[..., dict[str, Any]]:
    """Makes a run of STEPS steps of 6 ragged rows, which no number of processes splits evenly in every micro-batch."""

    def make(num_processes: int, **further: Any) -> dict[str, Any]:
        return spec_of(
            models.student,
            dataset_file,
            hf_teacher.target,
            **{
                "optimizer": {"max_steps": STEPS, "batch_size": 6},
                "resources": {"num_processes": num_processes},
                "checkpoint": {"every_steps": 2, "keep": 10},
            }
            | further,
        )

    return make


def assert_same(found: RunDir, expected: RunDir) -> None:
    for name in (
        "train/loss",
        "train/grad_norm",
        "train/trained_tokens",
        "eval/kl",
        "eval/agreement",
        "eval/alm",
    ):
        assert metric(found, name) == pytest.approx(metric(expected, name), abs=1e-5, rel=1e-5), name
    weights, others = final_weights(found), final_weights(expected)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        atol = KEY_BIAS_TOLERANCE if name.endswith("k_proj.bias") else 1e-5
        np.testing.assert_allclose(weight, others[name], rtol=0, atol=atol, err_msg=name)


def examples_of(run_dir: RunDir) -> dict[int, list[float | None]]:
    """KL of every token among the examples, by step; they are of the same rows everywhere."""
    entries = json.loads((run_dir.path / INDEX).read_bytes())["evaluations"]
    documents = [json.loads((run_dir.path / each["path"]).read_bytes()) for each in entries]
    assert [[each["number"] for each in document["rows"]] for document in documents] == [[0, 1, 2, 3]] * 2
    return {
        document["step"]: [target.get("kl") for row in document["rows"] for target in row["targets"]]
        for document in documents
    }


def run_with(tmp_path: Path, mark: Mapping[str, str], spec: dict[str, Any]) -> RunDir:
    """Finishes a run, in this process if it is the only one, else in processes of its own."""
    count = spec["resources"]["num_processes"]
    run_dir = make_run(tmp_path, f"ranks-{count}-{len(list(tmp_path.glob('runs/*')))}", spec)
    code = finish_here(run_dir) if count == 1 else finish(run_dir, environment=mark)
    assert code == 0, run_dir.log_path(1).read_text()[-3000:] if count > 1 else events(run_dir)
    return run_dir


CASES: dict[str, dict[str, Any]] = {
    "weighted": {
        "loss": {
            "terms": [
                {"divergence": "forward_kl", "token_weighting": "teacher_entropy"},
                {"divergence": "reverse_kl", "weight": 0.5},
            ],
            "reduction": "sequence_mean",
            "hard_weight": 0.3,
        },
        "data": {"packing": True},
        "optimizer": {"max_steps": STEPS, "micro_batch_size": 2, "grad_accum_steps": 3},
    },
    "foreign": {
        "loss": {
            "foreign_tokenizer": "alm",
            "chunks": "words",
            "terms": [{"weight": 100}],
            "hard_weight": 0.5,
        },
    },
    "mixed": {
        "contexts": [
            {"weight": 1, "dataset": {}},
            {
                "weight": 1,
                "student": {"generation": ROLLOUTS, "min_teacher_logprob": -1000},
                "loss": {
                    "terms": [
                        {"divergence": "reverse_kl"},
                        {"divergence": "reverse_kl", "estimator": "policy_gradient", "baseline": "batch"},
                    ],
                    "top_k": 8,
                },
            },
        ],
        "student": {"lora": {"rank": 4}, "output": "merged"},
    },
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("foreign", "weighted") else name
        for name in CASES
    ],
)
def test_two_processes_train_what_one_trains(spec: Any, tmp_path: Path, case: str) -> None:
    with no_process_left() as mark:
        alone = run_with(tmp_path, mark, spec(1, **CASES[case]))
        both = run_with(tmp_path, mark, spec(2, **CASES[case]))
    assert_same(both, alone)
    last = metric(both, "teacher/sequences_asked")[STEPS]
    assert last == metric(alone, "teacher/sequences_asked")[STEPS]
    assert events(both)[-1]["kind"] == "completed"
    assert len(events(both, "started")) == 1
    assert both.checkpoints() == alone.checkpoints()
    found, expected = examples_of(both), examples_of(alone)
    assert found.keys() == expected.keys() == {0, STEPS}
    for step, values in found.items():
        assert values == pytest.approx(expected[step], abs=5e-4)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    """Returns once `condition` holds or the process has ended."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Returns the further processes that the first one has started."""
    return [each for each in psutil.Process(process.pid).children() if "--worker" in each.cmdline()]


@pytest.mark.slow
@pytest.mark.faults(row=7)
def test_a_process_that_is_killed_ends_the_run_and_any_number_resumes(spec: Any, tmp_path: Path) -> None:
    changes = {
        "optimizer": {"max_steps": 40, "micro_batch_size": 2, "grad_accum_steps": 3, "learning_rate": 1e-3},
        "checkpoint": {"every_steps": 3, "keep": 3},
    }
    with no_process_left() as mark:
        alone = run_with(tmp_path, mark, spec(1, **changes))
        run_dir = make_run(tmp_path, "killed", spec(2, **changes))
        process = start(run_dir, 1, mark)
        wait_for(run_dir.checkpoints, process)
        process.kill()  # the others see it, and end
        process.wait()
    kept = run_dir.checkpoints()[-1]
    with no_process_left() as mark:
        process = start(run_dir, 2, mark)
        wait_for(lambda: run_dir.checkpoints()[-1] > kept, process)
        (worker,) = workers_of(process)
        worker.kill()
        assert process.wait(DEADLINE_S) == EXIT_FAILED
    assert "Process 1 of 2 (from 0) was ended by SIGKILL" in failure(run_dir)
    assert events(run_dir, "started")[-1]["step"] == kept
    kept = run_dir.checkpoints()[-1]
    assert find_damage(run_dir.checkpoint_path(kept)) is None
    # The position in the data belongs to the run, not to a process: one process resumes a run of two.
    effective = run_dir.effective_spec()
    effective.resources.num_processes = 1
    RunDir.create(run_dir.path, effective, effective)
    assert finish_here(run_dir, 3) == 0
    assert events(run_dir, "started")[-1]["step"] == kept
    assert_same(run_dir, alone)


def test_processes_that_torchrun_starts_are_one_run(spec: Any, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "runs" / "by-hand")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(spec(0)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    module = [
        "-m",
        "stillhouse.student_trainer.train",
        str(run_dir.path),
        "--attempt",
        "1",
        "--spec",
        str(run_file),
    ]
    with no_process_left() as mark:
        done = subprocess.run(
            [*torchrun, *rendezvous, *module],
            env={**os.environ, **mark, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(metric(run_dir, "train/loss")) == list(range(1, STEPS + 1))
    assert events(run_dir)[-1]["kind"] == "completed"


def test_metrics_of_several_processes_are_merged() -> None:
    first = {"train/rollout_tokens": 4.0, "train/rollouts_dropped": 1.0, "train/teacher_wait_s": 2.0}
    second = {"train/rollout_tokens": 10.0, "train/rollouts_dropped": 2.0, "train/teacher_wait_s": 1.0}
    assert merge_metrics([(1, first), (2, second), (0, {})]) == {
        "train/rollout_tokens": 8.0,
        "train/rollouts_dropped": 3.0,
        "train/teacher_wait_s": 2.0,
    }
