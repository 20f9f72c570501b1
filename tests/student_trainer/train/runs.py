"""Run directories made by hand, as the run service makes them, and the training process on them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format
from safetensors.numpy import load_file

from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.run_dir import Journal, RunDir
from stillhouse.student_trainer.train.__main__ import work


def make_run(data_dir: Path, name: str, spec: Mapping[str, Any]) -> RunDir:
    """A run directory that is ready for attempt 1."""
    message = json_format.ParseDict(dict(spec), RunSpec())
    run_dir = RunDir.create(data_dir / "runs" / name, message, to_proto(from_proto(message)))
    run_dir.write_control(1, stop=False)
    return run_dir


def spec_of(
    student: Path, data: Path, target: str | None, /, **further: Mapping[str, Any] | list[Any]
) -> dict[str, Any]:
    """A small run: 7 steps of 2 x 4 sequences, float32 on the wire. `further` replaces fields inside sections."""
    spec: dict[str, Any] = {
        "student": {"model": str(student)},
        "data": {"train": [{"path": str(data)}], "eval_fraction": 0.1},
        "optimizer": {"learning_rate": 3e-3, "micro_batch_size": 4, "grad_accum_steps": 2},
        "loss": {"top_k": 32},
    }
    if target is not None:
        spec["teachers"] = [{"targets": [target], "logprob_dtype": "float32"}]
    for section, values in further.items():
        spec[section] = {**spec.get(section, {}), **values} if isinstance(values, Mapping) else values
    if "batch_size" in spec["optimizer"]:  # passes cut by tokens instead
        del spec["optimizer"]["micro_batch_size"], spec["optimizer"]["grad_accum_steps"]
    return spec


def start(
    run_dir: RunDir, attempt: int = 1, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """The training process as the run service starts it."""
    run_dir.write_control(attempt, stop=False)
    log = run_dir.log_path(attempt)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "stillhouse.student_trainer.train",
                str(run_dir.path),
                "--attempt",
                str(attempt),
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )


def finish(run_dir: RunDir, attempt: int = 1, environment: Mapping[str, str] | None = None) -> int:
    """Exit code of a whole attempt, whose log has events of ours alone."""
    code = start(run_dir, attempt, environment).wait(timeout=200)
    foreign = [each for each in run_dir.log_path(attempt).read_text().splitlines() if '"event":' not in each]
    assert not foreign, foreign
    return code


def assert_ends(
    process: subprocess.Popen[bytes], run_dir: RunDir, code: int = 0, *, within_s: float = 100.0
) -> None:
    """The first attempt's process ends so, or the end of its log is shown."""
    assert process.wait(within_s) == code, run_dir.log_path(1).read_text()[-3000:]


def finish_here(run_dir: RunDir, attempt: int = 1, stopped: Callable[[], bool] = lambda: False) -> int:
    """Exit code of a whole attempt in this process, which saves the time of starting one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    run_dir.write_control(attempt, stop=False)
    try:
        with run_dir.open_attempt(attempt) as opened:
            return work(opened, stopped)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def events(run_dir: RunDir, kind: str | None = None) -> list[dict[str, Any]]:
    """The run's events, of one kind or all."""
    return [line for line in _lines(run_dir, "events.jsonl") if kind in (None, line["kind"])]


def waits(run_dir: RunDir) -> list[str]:
    """The conditions that the run reported, in order, but for the preparation of its data, which only a slow machine shows."""
    found = [event["condition"] for event in events(run_dir, "condition")]
    return found[2:] if found[:1] == ["PREPARING_DATA"] else found


def metric(run_dir: RunDir, name: str) -> dict[int, float]:
    """Step to value; of several attempts the last counts."""
    lines = _lines(run_dir, "metrics.jsonl")
    return {line["step"]: line["values"][name] for line in lines if name in line["values"]}


def _lines(run_dir: RunDir, journal: Journal) -> list[dict[str, Any]]:
    lines, offset = run_dir.read_lines(journal, 0)
    while (more := run_dir.read_lines(journal, offset))[1] != offset:
        lines += more[0]
        offset = more[1]
    return lines


def failure(run_dir: RunDir) -> str:
    """The sentence of the last `failed` event."""
    return str(events(run_dir, "failed")[-1]["error"]["message"])


def final_weights(run_dir: RunDir) -> dict[str, Any]:
    """The final model's arrays by name."""
    return dict(load_file(run_dir.final_path / "model.safetensors"))


def assert_same_end(found: RunDir, expected: RunDir) -> None:
    """Both have the same losses and, bit for bit, the same final weights."""
    assert metric(found, "train/loss") == metric(expected, "train/loss")
    weights, others = final_weights(found), final_weights(expected)
    assert weights.keys() == others.keys()
    for name, weight in others.items():
        np.testing.assert_array_equal(weights[name], weight, err_msg=name)
