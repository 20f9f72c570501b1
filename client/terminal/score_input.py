"""Writes scored sequences as one .npz file: arrays over all rows, and the offset of each sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stillhouse.client.core.errors import file_errors, usage_error
from stillhouse.client.teacher.score import ScoreAnswer
from stillhouse.protos.files.atomic import atomic_writer
from stillhouse.protos.tensors.distributions import Distributions

_OPTIONAL = ("entropy", "log_partitions", "sampled_token_ids", "sampled_logprobs")


class ScoreFile:
    """Collects score results for the .npz file at `path`.

    Arrays, for N scored sequences with R rows in all: `ids` [N] text, `offsets` int64 [N + 1], `start` int32 [N];
    `token_ids` and `logprobs` [R, K]; `target_logprobs` and `log_tail` [R]; what else was requested; `error_ids` and
    `errors` text [E], of sequences that could not be scored.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".npz":
            raise usage_error(f"--out expects a name that ends in .npz, not {path}.")
        self._path = path
        self._ids: list[str] = []
        self._distributions: list[Distributions] = []
        self._errors: list[tuple[str, str]] = []

    def add(self, answer: ScoreAnswer) -> None:
        """Adds one result."""
        if answer.distributions is not None:
            self._ids.append(str(answer.id))
            self._distributions.append(answer.distributions)
        elif answer.error is not None:
            self._errors.append((str(answer.id), answer.error.message))

    def write(self) -> None:
        """Writes the file atomically. Raises StillhouseError if it cannot be written."""
        arrays = {
            "ids": np.array(self._ids, dtype=np.str_),
            "offsets": np.cumsum([0, *(each.num_rows for each in self._distributions)], dtype=np.int64),
            "start": np.array([each.start for each in self._distributions], dtype=np.int32),
            "error_ids": np.array([name for name, _ in self._errors], dtype=np.str_),
            "errors": np.array([message for _, message in self._errors], dtype=np.str_),
        }
        for name in ("token_ids", "logprobs", "target_logprobs", "log_tail", *_OPTIONAL):
            parts = [part for each in self._distributions if (part := getattr(each, name)) is not None]
            if parts:
                arrays[name] = np.concatenate(parts)
        with file_errors("write", self._path), atomic_writer(self._path) as file:
            np.savez(file, allow_pickle=False, **arrays)
