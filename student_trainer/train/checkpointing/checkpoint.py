"""Checkpoints: loadable models with everything else that a run needs to resume bit for bit; a reader never sees half of one.

Order of writing: files into a temporary directory, MANIFEST.json with their SHA-256, fsync of all, rename, fsync of
the parent; old ones go last. A kill or a power cut at any point leaves the
checkpoints before it whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import sync_directory, sync_tree
from stillhouse.student_trainer.run_dir import MANIFEST, Attempt, RunDir
from stillhouse.student_trainer.train.process import failpoints
from stillhouse.student_trainer.train.rollouts.rollout_buffer import RolloutBuffer
from stillhouse.student_trainer.train.student.saving import unchanged_names
from stillhouse.student_trainer.train.student.student import Student

log = structlog.get_logger()

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
"""Version 1 has all weights in WEIGHTS, and no model beside them."""
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.pt", "state.json"
"""WEIGHTS holds the trained weights that the model's own files hold under other names, as those of an adapter."""
MODEL = "model*.safetensors"
PROJECTIONS = "projections.safetensors"
"""Matrices of loss.hidden_mse, where it has any; no part of the model."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """Progress of a run; the position in the data follows from `step`."""

    step: int = 0
    """Optimizer steps taken, those without an update included."""
    trained_tokens: int = 0
    """Completion tokens trained on."""
    skipped_steps: int = 0
    """Steps with a non-finite loss or gradient, which changed no weight."""
    skipped_in_a_row: int = 0
    """Consecutive skipped steps so far."""

    def version(self) -> int:
        """Number of updates that the weights have had."""
        return self.step - self.skipped_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """State that a checkpoint saves and restores in place, besides the random generators."""

    student: Student
    optimizer: torch.optim.Optimizer
    scaler: Any
    """torch's GradScaler with fp16, else None."""
    progress: Progress
    in_flight: RolloutBuffer = dataclasses.field(default_factory=RolloutBuffer)
    """Rollouts that no step has consumed yet."""


def save(
    attempt: Attempt,
    trained: TrainingState,
    facts: Mapping[str, str],
    *,
    keep: int,
    protected: int | None = None,
) -> Path:
    """Writes the checkpoint of the current step and removes all but the newest `keep` and that of step `protected`.

    `facts` are recorded in the manifest (`facts_of`). Raises StillhouseError(RUN_STATE) if another attempt owns the run;
    OSError, as of a full disk, after removing what it began.
    """
    run_dir, step = attempt.run_dir, trained.progress.step
    target = run_dir.checkpoint_path(step)
    temporary = target.with_name(f".{step}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_files(temporary, target, trained)
        _write_manifest(temporary, step, facts)
        sync_tree(temporary)
        failpoints.reach("checkpoint.before_rename")
        attempt.check_fence()
        _discard(target)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    failpoints.reach("checkpoint.after_rename")
    sync_directory(target.parent)
    for old in run_dir.checkpoints()[:-keep]:
        if old != protected:
            _discard(run_dir.checkpoint_path(old))
            failpoints.reach("checkpoint.after_prune")
    return target


def restore(attempt: Attempt, trained: TrainingState) -> int | None:
    """Restores the newest checkpoint that is whole, in place; its step, or None if there never was one.

    A damaged one is set aside under another name. Raises StillhouseError(CHECKPOINT_CORRUPT) if all are damaged, or gone.
    """
    run_dir = attempt.run_dir
    for leftover in run_dir.checkpoints_path.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    damaged: list[str] = []
    for step in reversed(run_dir.checkpoints()):
        path = run_dir.checkpoint_path(step)
        problem = find_damage(path)
        if problem is None:
            _read_files(path, trained)
            return step
        log.error("checkpoint is damaged and set aside", step=step, why=problem)
        damaged.append(f"{path.name}: {problem}")
        attempt.check_fence()
        _discard(path.with_name(f"{step}.corrupt"))
        path.rename(path.with_name(f"{step}.corrupt"))
    if damaged:
        raise StillhouseError(
            Reason.CHECKPOINT_CORRUPT,
            f"No checkpoint in {run_dir.checkpoints_path} is whole ({'; '.join(damaged)}). "
            "Check the disk, then resume the run to begin at step 0, or create it again.",
        )
    lost = None if any(run_dir.checkpoints_path.glob("*.corrupt")) else _last_reported(run_dir)
    if lost is not None:
        raise StillhouseError(
            Reason.CHECKPOINT_CORRUPT,
            f"{run_dir.checkpoints_path} holds no checkpoint, although the run wrote that of step {lost}: it was removed. "
            "Put it back, or create the run again.",
        )
    return None


def _last_reported(run_dir: RunDir) -> int | None:
    """Returns the step of the last checkpoint that the run's journal tells of; None if it tells of none."""
    last, offset = None, 0
    while True:
        lines, end = run_dir.read_lines("events.jsonl", offset)
        if end == offset:
            return last
        offset = end
        for line in lines:
            if line.get("kind") == "checkpoint":
                last = int(line["step"])


def restore_step(run_dir: RunDir, step: int, trained: TrainingState) -> None:
    """Restores the checkpoint of `step`, which another process of this attempt has found whole, in place."""
    _read_files(run_dir.checkpoint_path(step), trained)


def facts_of(run_dir: RunDir, step: int) -> dict[str, str]:
    """The facts that were saved with the checkpoint of `step`, which is whole."""
    manifest = json.loads((run_dir.checkpoint_path(step) / MANIFEST).read_bytes())
    return {name: value for name, value in manifest.items() if isinstance(value, str)}


def find_damage(path: Path) -> str | None:
    """Checks a checkpoint's files against its manifest; the first damage, None if there is none."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["format_version"] not in READ_VERSIONS:
            return f"its format is {manifest['format_version']}; this version reads {FORMAT_VERSION}"
        for name in (*files, OPTIMIZER, STATE):
            size = (path / name).stat().st_size
            if size != files[name]["size_bytes"]:
                return f"{name} has {size} bytes; {files[name]['size_bytes']} were written"
            if _sha256(path / name) != files[name]["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _write_files(directory: Path, target: Path, trained: TrainingState) -> None:
    trained.student.save(directory, target)
    stored = set() if trained.student.config.trains_adapter else unchanged_names(trained.student.model)
    weights = {
        name: each.detach().contiguous()
        for name, each in _saved_tensors(trained.student.model).items()
        if name not in stored
    }
    if weights:
        save_file(weights, directory / WEIGHTS)
    projections = {name: each.contiguous() for name, each in trained.student.projections.state_dict().items()}
    if projections:
        save_file(projections, directory / PROJECTIONS)
    failpoints.reach("checkpoint.after_weights")
    state = {
        "optimizer": trained.optimizer.state_dict(),
        "scaler": trained.scaler.state_dict() if trained.scaler else None,
        "in_flight": trained.in_flight.state(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with (directory / OPTIMIZER).open("wb") as file:
        torch.save(state, file)
    failpoints.reach("checkpoint.after_optimizer")
    generator, keys, position, has_gauss, cached = np.random.get_state()
    plain = {
        "progress": dataclasses.asdict(trained.progress),
        "python_rng": random.getstate(),
        "numpy_rng": [generator, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    (directory / STATE).write_bytes(json.dumps(plain).encode())


def _write_manifest(directory: Path, step: int, facts: Mapping[str, str]) -> None:
    files = {
        path.relative_to(directory).as_posix(): {
            "sha256": _sha256(path),
            "size_bytes": path.stat().st_size,
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    manifest = {"format_version": FORMAT_VERSION, "step": step, **facts, "files": files}
    (directory / MANIFEST).write_bytes(json.dumps(manifest, indent=1).encode())


def restore_weights(run_dir: RunDir, step: int, model: nn.Module) -> None:
    """Restores the weights alone of the checkpoint of `step`, which is whole, in place."""
    _read_weights(run_dir.checkpoint_path(step), model)


def _read_weights(directory: Path, model: nn.Module) -> None:
    weights: dict[str, Tensor] = {}
    for path in (*sorted(directory.glob(MODEL)), directory / WEIGHTS):
        if path.is_file():
            weights |= load_file(path)
    tensors = _saved_tensors(model)
    if any(name not in weights or weights[name].shape != each.shape for name, each in tensors.items()):
        raise StillhouseError(
            Reason.CHECKPOINT_CORRUPT,
            f"{directory} holds other weights than student.model has. The model's files were changed under the run; "
            "restore them, or create the run again.",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name])


def _read_projections(directory: Path, projections: nn.ParameterDict) -> None:
    own = projections.state_dict()
    path = directory / PROJECTIONS
    stored = load_file(path) if path.is_file() else {}
    if {name: each.shape for name, each in own.items()} != {
        name: each.shape for name, each in stored.items()
    }:
        raise StillhouseError(
            Reason.CHECKPOINT_CORRUPT,
            f"{directory} holds projections of hidden states ({', '.join(stored) or 'none'}) for other layers than "
            "loss.hidden_mse compares. Set its layers and weight as before, or create the run again.",
        )
    projections.load_state_dict(stored)


def _read_files(directory: Path, trained: TrainingState) -> None:
    _read_weights(directory, trained.student.model)
    _read_projections(directory, trained.student.projections)
    state = torch.load(directory / OPTIMIZER, map_location="cpu", weights_only=True)
    trained.optimizer.load_state_dict(state["optimizer"])
    if trained.scaler and state["scaler"]:
        trained.scaler.load_state_dict(state["scaler"])
    trained.in_flight.restore(state.get("in_flight", []))
    torch.set_rng_state(state["torch_rng"])
    if torch.cuda.is_available() and state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    plain = json.loads((directory / STATE).read_bytes())
    version, numbers, gauss = plain["python_rng"]
    random.setstate((version, tuple(numbers), gauss))
    generator, keys, position, has_gauss, cached = plain["numpy_rng"]
    np.random.set_state((generator, np.asarray(keys, np.uint32), position, has_gauss, cached))
    for name, value in plain["progress"].items():
        setattr(trained.progress, name, value)


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that training changes: trained parameters, shared ones once, and buffers that belong to the weights."""
    tensors: dict[str, Tensor] = {name: each for name, each in model.named_parameters() if each.requires_grad}
    persistent = model.state_dict(keep_vars=True).keys()
    return tensors | {name: each for name, each in model.named_buffers() if name in persistent}


def _discard(path: Path) -> None:
    """Removes a checkpoint; a reader never sees it half removed."""
    if path.exists():
        trash = path.with_name(f".{path.name}.trash.tmp")
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_good(run_dir: RunDir) -> str:
    """The newest checkpoint by name, for errors."""
    steps = run_dir.checkpoints()
    return (
        f"The last good checkpoint is that of step {steps[-1]}." if steps else "There is no checkpoint yet."
    )
