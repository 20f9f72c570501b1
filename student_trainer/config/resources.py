"""The sections `checkpoint`, `resources`, `retry`, `notify` and `trackers` of a run's configuration (schema.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from stillhouse.student_trainer.config.fields import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    Choices,
    DefaultText,
    MaxLength,
    Range,
    Required,
)

CHECKPOINT_EVERY_STEPS = 500
CHECKPOINT_EVERY_SECONDS = 1800.0
"""Longest time that a run killed in its first steps has lost."""
MAX_PROCESSES = 64
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "swanlab")
"""Kinds of trackers; each is a module of student_trainer/tracking/kinds/."""
TRACKERS_FOLDER = "trackers"
"""Folder of a run's directory with the files of its trackers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Intervals between checkpoints, besides the one at the end; each that is set counts separately."""

    every_steps: Annotated[
        int | None,
        COUNT,
        DefaultText(f"{CHECKPOINT_EVERY_STEPS}, if every_epochs and every_seconds are unset too"),
    ] = None
    every_epochs: Annotated[float | None, POSITIVE] = None
    every_seconds: Annotated[
        float | None,
        POSITIVE,
        DefaultText(f"{CHECKPOINT_EVERY_SECONDS:g}, if every_steps and every_epochs are unset too"),
    ] = None
    keep: Annotated[int, COUNT] = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceConfig:
    """Devices and processes of the run."""

    gpus: Annotated[tuple[int, ...], NOT_NEGATIVE] = ()
    gpu_count: Annotated[
        int | None, NOT_NEGATIVE, DefaultText("1 where the service has any, else the CPU is used")
    ] = None
    num_processes: Annotated[int, Range(0, MAX_PROCESSES)] = 0

    @property
    def processes(self) -> int:
        """Training processes of the run."""
        return self.num_processes or max(1, len(self.gpus) or self.gpu_count or 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryConfig:
    """Recovery from failures."""

    max_attempts: Annotated[int, COUNT] = 1
    teacher_wait_s: Annotated[float, NOT_NEGATIVE] = 3600.0
    halve_micro_batch: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class NotifyConfig:
    """A webhook that is told of the run's states."""

    url: Annotated[str, MaxLength(2000), Required('is required, such as "https://example.org/hook".')] = ""
    states: Annotated[
        tuple[str, ...],
        Choices("pending", "starting", "running", "stopping", "stopped", "completed", "failed"),
    ] = ("stopped", "completed", "failed")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerConfig:
    """An experiment tracker that gets the run's metrics."""

    kind: Annotated[str, Choices(*TRACKERS), Required('is required, such as "wandb".')] = ""
    project: Annotated[str, MaxLength(100)] = "stillhouse"
    name: Annotated[str, MaxLength(200), DefaultText("display_name, or the run's id")] = ""
    uri: Annotated[str, MaxLength(2000)] = ""
    credential: Annotated[str, MaxLength(200)] = ""
    entity: Annotated[str, MaxLength(100)] = ""

    @property
    def is_online(self) -> bool:
        """True if it sends to a server, else it writes files in the run's directory."""
        return bool(self.uri or self.credential)
