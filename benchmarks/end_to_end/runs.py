"""Specs of Stillhouse's arms, and their training processes without a run service."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from benchmarks.end_to_end.sizes import Sizes, Work
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.run_dir import RunDir

NOWHERE = "127.0.0.1:1"
"""Target of a spec whose teacher is not asked."""
LORA_RANK = 16


def off_policy_spec(
    work: Work, sizes: Sizes, target: str | None, *, cache: Path | None = None, cache_mode: str = ""
) -> RunSpec:
    """Forward KL on the texts, with the target of the losses that a run takes by itself."""
    spec = _common(sizes, target)
    spec.student.model = str(work.student)
    spec.data.train.add(path=str(work.train))
    if cache is not None:
        spec.cache.path, spec.cache.mode = str(cache), cache_mode
    return spec


def on_policy_spec(
    work: Work, sizes: Sizes, target: str | None, *, services: Sequence[str] = (), lora: bool = False
) -> RunSpec:
    """Reverse KL on the student's own texts, one for each prompt."""
    spec = _common(sizes, target)
    spec.student.model = str(work.warm_student)
    if lora or services:
        spec.student.lora.rank, spec.student.lora.alpha = LORA_RANK, 2 * LORA_RANK
        spec.student.output = "merged"
    spec.data.train.add(path=str(work.prompts))
    spec.data.seed = spec.optimizer.seed = sizes.seed
    context = spec.contexts.add(weight=1.0).student
    context.generation.max_new_tokens = sizes.new_tokens
    context.generation.samples_per_prompt = 1
    context.min_teacher_logprob = -1000.0
    context.rollout_targets.extend(services)
    spec.loss.terms.add(divergence="reverse_kl", weight=1.0)
    return spec


def _common(sizes: Sizes, target: str | None) -> RunSpec:
    spec = RunSpec()
    spec.teachers.add(targets=[target or NOWHERE])
    spec.data.max_sequence_tokens = sizes.length
    spec.data.eval_fraction = 0.0
    spec.optimizer.learning_rate = sizes.learning_rate
    spec.optimizer.lr_scheduler = "linear"
    spec.optimizer.warmup_fraction = 0.0
    spec.optimizer.weight_decay = 0.0
    spec.optimizer.batch_size = sizes.batch
    spec.optimizer.max_steps = sizes.steps
    spec.optimizer.precision = sizes.precision
    spec.checkpoint.every_steps = sizes.every
    spec.checkpoint.keep = len(sizes.snapshots) + 1
    return spec


def make_run_dir(path: Path, spec: RunSpec) -> RunDir:
    """A run that its training process can begin with."""
    run_dir = RunDir.create(path, spec, to_proto(from_proto(spec)))
    run_dir.write_control(1, stop=False)
    return run_dir


def step_times(run_dir: RunDir) -> dict[int, float]:
    """Time at the end of each step, in seconds since the epoch."""
    if not run_dir.metrics_path.exists():
        return {}
    found = {}
    for line in run_dir.metrics_path.read_text().splitlines():
        point = json.loads(line)
        if "train/loss" in point["values"]:
            found[int(point["step"])] = datetime.fromisoformat(point["time"]).timestamp()
    return found


def metric_of(run_dir: RunDir, name: str) -> dict[int, float]:
    """Values of a metric, by step."""
    points = [json.loads(line) for line in run_dir.metrics_path.read_text().splitlines()]
    return {int(each["step"]): each["values"][name] for each in points if name in each["values"]}


def started_s(run_dir: RunDir) -> float | None:
    """Time at which the steps began, in seconds since the epoch."""
    for line in run_dir.events_path.read_text().splitlines() if run_dir.events_path.exists() else ():
        event = json.loads(line)
        if event.get("kind") == "started":
            return datetime.fromisoformat(event["time"]).timestamp()
    return None
