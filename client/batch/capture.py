"""Captures a batch's distributions in a cache of teacher outputs: one decoding yields text and distributions."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stillhouse.client.batch.dispatcher import RowResult
from stillhouse.client.batch.teacher_identity import BatchTeacher
from stillhouse.client.core.errors import file_error, file_errors, usage_error
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import DistributionConfig
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions

if TYPE_CHECKING:
    from stillhouse.protos.cache.writer import CacheWriter

FLUSH_S = 60.0
"""Longest time that rows wait for their shard; a kill loses waiting rows."""
FLUSH_ROWS = 1 << 14
"""Most rows that wait for their shard."""


class Capture:
    """A cache of `top_k` candidates of every generated token; a context manager."""

    def __init__(self, path: Path, top_k: int, teacher: BatchTeacher) -> None:
        """Raises StillhouseError if pyarrow is missing, another process writes the cache, or it cannot be written."""
        self._path = path
        self._teacher = teacher
        self._config = DistributionConfig(top_k=top_k, logprob_dtype=Tensor.DATA_TYPE_FLOAT16)
        self._writer = _open(path)
        self._waiting: list[Any] = []
        self._since_s = time.monotonic()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        with file_errors("write", self._path):
            self._writer.close()

    @property
    def is_due(self) -> bool:
        """True if flush() should be called."""
        return len(self._waiting) >= FLUSH_ROWS or time.monotonic() - self._since_s > FLUSH_S

    def add(self, answer: RowResult, kept: Any) -> None:
        """Adds the distributions of a row; flush() returns `kept` once they are on the disk."""
        from stillhouse.protos.cache.format import CacheMeta

        for (prompt, _), completion in sorted(answer.completions.items()):
            distributions, prompt_ids = completion.distributions, completion.prompt_token_ids
            if (
                distributions is None
                or prompt_ids is None
                or completion.error is not None
                or not distributions.num_rows
            ):
                continue
            message = answer.row.prompts[prompt]
            if message.WhichOneof("student") and completion.student_prompt_token_ids is None:
                raise StillhouseError(
                    Reason.CAPABILITY,
                    "The teacher service does not know student_prompt, so the captured text would hold the teacher's own prompt. "
                    "Bring the service to this version.",
                )
            meta = CacheMeta.from_config(
                self._teacher.info,
                self._config,
                adapter=message.adapter,
                adapter_fingerprint=self._teacher.fingerprint(message.adapter),
            )
            meta = replace(meta, template_date=message.conversation.date)
            sequence = np.concatenate([prompt_ids, completion.token_ids])
            with file_errors("write", self._path):
                self._writer.add(
                    meta,
                    sequence,
                    truncate_top_k(distributions, self._config.top_k),
                    student_prompt_ids=completion.student_prompt_token_ids,
                )
        self._waiting.append(kept)

    def flush(self) -> list[Any]:
        """Syncs the cache and returns the `kept` values of the rows that it now holds."""
        with file_errors("write", self._path):
            self._writer.flush()
        self._since_s = time.monotonic()
        waiting, self._waiting = self._waiting, []
        return waiting


def truncate_top_k(distributions: Distributions, top_k: int) -> Distributions:
    """Moves all but `top_k` candidates into the tail."""
    if distributions.token_ids.shape[1] <= top_k:
        return distributions
    tail = np.logaddexp.reduce(distributions.logprobs[:, top_k:].astype(np.float64), axis=1)
    return Distributions(
        start=distributions.start,
        token_ids=np.ascontiguousarray(distributions.token_ids[:, :top_k]),
        logprobs=np.ascontiguousarray(distributions.logprobs[:, :top_k]),
        target_logprobs=distributions.target_logprobs,
        log_tail=np.logaddexp(distributions.log_tail, tail).astype(np.float32),
    )


def _open(path: Path) -> CacheWriter:
    try:
        from stillhouse.protos.cache.writer import CacheWriter

        return CacheWriter(path)
    except ImportError as error:
        raise usage_error(
            "--capture needs pyarrow, which is not installed here: pip install pyarrow."
        ) from error
    except OSError as error:
        raise file_error("write", path, error) from error
