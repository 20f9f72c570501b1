"""One run in five variants with the same losses at every step: online, caching, cached, killed and resumed, and in
this process.

The variant in this process shares only the order of rows and the optimizer with the services: both models are in one
process, and the loss is KL over full logits.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.acceptance.languages import load
from stillhouse.client.api import RunHandle, Trainer
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.config.schema import OptimizerConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.data.schedule import Schedule
from stillhouse.student_trainer.train.optim import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)

WRITE_THROUGH, OUT_OF_CACHE, KILLED, IN_PROCESS = (
    "written through to a cache",
    "out of the cache",
    "killed and resumed",
    "in one process",
)
CURVES = (WRITE_THROUGH, OUT_OF_CACHE, KILLED, IN_PROCESS)
CHECKPOINT_STEPS = 10
KILL_AFTER_CHECKPOINT = 30
KILL_WAIT_S = 600.0

Curve = NDArray[np.float64]


def differences(
    client: Trainer, spec: Mapping[str, Any], *, cache: str, data_dir: Path, here: Curve
) -> dict[str, float]:
    """Largest difference to the online run's loss over all steps, by variant.

    `spec` describes a run without a cache; `cache` is a path for one, `data_dir` the service's data directory, `here`
    the curve of `curve_here`.
    """
    first = _create(client, spec, "online")
    through = _create(client, {**spec, "cache": {"path": cache, "mode": "write_through"}}, WRITE_THROUGH)
    checkpoints = {"every_steps": CHECKPOINT_STEPS, "keep": 2}
    killed = _create(client, {**spec, "checkpoint": checkpoints}, KILLED)
    _kill(killed, data_dir)
    killed.resume()
    online, curves = _curve(first), {WRITE_THROUGH: _curve(through)}
    # An unnamed teacher cannot have been queried.
    without = {key: value for key, value in spec.items() if key != "teachers"}
    only = {**without, "cache": {"path": cache, "mode": "only"}}
    curves[OUT_OF_CACHE] = _curve(_create(client, only, OUT_OF_CACHE))
    curves[KILLED] = _curve(killed)
    curves[IN_PROCESS] = here
    return {name: float(np.abs(online - curves[name]).max()) for name in CURVES}


def curve_here(
    teacher_dir: Path, student_dir: Path, rows: Tensor, *, steps: int, rate: float, batch: int, seed: int
) -> Curve:
    """[steps]: losses of a run on `rows`, INT64 [N, T], with full KL, computed without any service."""
    optimizer_config = OptimizerConfig(learning_rate=rate, max_steps=steps, micro_batch_size=batch, seed=seed)
    schedule = Schedule.from_config(len(rows), optimizer_config, seed)
    teacher, student = load(teacher_dir), load(student_dir).train()
    optimizer = make_optimizer(dict(student.named_parameters()), optimizer_config)
    losses = []
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(step, steps, optimizer_config))
        ids = rows[schedule.rows(step)]
        with torch.no_grad():
            p = teacher(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        q = student(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        loss = (p.exp() * (p - q)).sum(-1).mean()
        loss.backward()
        clip_gradients(student.parameters(), optimizer_config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return np.array(losses)


def _create(client: Trainer, spec: Mapping[str, Any], name: str) -> RunHandle:
    return client.create_run({**spec, "display_name": f"{spec['display_name']}: {name}"})


def _kill(handle: RunHandle, data_dir: Path) -> None:
    """Sends SIGKILL to the training process after a checkpoint in mid-run; returns once the run has failed."""
    run_dir = RunDir(data_dir / handle.name)
    deadline = time.monotonic() + KILL_WAIT_S
    while max(run_dir.checkpoints(), default=0) < KILL_AFTER_CHECKPOINT:
        if time.monotonic() > deadline:
            raise click.ClickException(f"{handle.name} has no checkpoint after {KILL_WAIT_S:g} s")
        time.sleep(0.005)
    record = run_dir.process()
    assert record is not None, "a process wrote the checkpoint"
    psutil.Process(record.pid).kill()
    run = handle.wait()
    if run.state != Run.STATE_FAILED or run.attempts[-1].signal != signal.SIGKILL:
        raise click.ClickException(f"{handle.name} was to be killed and is {Run.State.Name(run.state)}")


def _curve(handle: RunHandle) -> Curve:
    """[steps]: loss of every step."""
    run = handle.wait()
    if run.state != Run.STATE_COMPLETED:
        raise click.ClickException(f"{run.name} ({run.spec.display_name}) failed: {run.error.message}")
    series = handle.metrics("train/loss")["train/loss"]
    if series.steps.tolist() != list(range(1, len(series.steps) + 1)):
        raise click.ClickException(f"{run.name} did not tell the loss of every step")
    return series.values
