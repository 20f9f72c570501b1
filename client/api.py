"""Everything a notebook needs: `from client.api import Teacher, Trainer`."""

from client.completions import Completion, Piece
from client.run_file import RunFile, load_run_file
from client.run_handle import RunHandle, Series
from client.scoring import ScoreAnswer, ScoreItem
from client.teacher import Teacher
from client.trainer import PushedDataset, Trainer
from protos.errors import Reason, StillhouseError
from protos.tensor_codec import Distributions

__all__ = [
    "Completion",
    "Distributions",
    "Piece",
    "PushedDataset",
    "Reason",
    "RunFile",
    "RunHandle",
    "ScoreAnswer",
    "ScoreItem",
    "Series",
    "StillhouseError",
    "Teacher",
    "Trainer",
    "load_run_file",
]
