"""Public API: `from stillhouse import Teacher, Trainer`."""

from stillhouse.client.batch.input_rows import Sampling
from stillhouse.client.batch.pipeline import (
    BatchProgress,
    BatchSettings,
    BatchSummary,
    Listeners,
    generate_file,
)
from stillhouse.client.runfile.load import RunFile, load_run_file
from stillhouse.client.teacher.generate import Completion, Piece
from stillhouse.client.teacher.score import ScoreAnswer, ScoreItem
from stillhouse.client.teacher.teacher import Teacher
from stillhouse.client.trainer.run_handle import RunHandle, Series
from stillhouse.client.trainer.trainer import PushedDataset, Trainer
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions

__all__ = [
    "BatchProgress",
    "BatchSettings",
    "BatchSummary",
    "Completion",
    "Distributions",
    "Listeners",
    "Piece",
    "PushedDataset",
    "Reason",
    "RunFile",
    "RunHandle",
    "Sampling",
    "ScoreAnswer",
    "ScoreItem",
    "Series",
    "StillhouseError",
    "Teacher",
    "Trainer",
    "generate_file",
    "load_run_file",
]
