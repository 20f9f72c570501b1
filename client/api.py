"""Everything a notebook needs: `from client.api import Teacher, Trainer`."""

from client.batch import BatchProgress, BatchSettings, BatchSummary, Listeners, generate_file
from client.batch_rows import Sampling
from client.completions import Completion, Piece
from client.run_file import RunFile, load_run_file
from client.run_handle import RunHandle, Series
from client.scoring import ScoreAnswer, ScoreItem
from client.teacher import Teacher
from client.trainer import PushedDataset, Trainer
from protos.errors import Reason, StillhouseError
from protos.tensor_codec import Distributions

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
