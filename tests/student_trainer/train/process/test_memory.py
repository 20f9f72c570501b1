"""Exhausted memory: told from other errors by its cause, reported with the pass that needed it, and survived in halves."""

from __future__ import annotations

import errno
import gc
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch

from stillhouse.protos.errors import Reason, StillhouseError, from_json, from_status
from stillhouse.student_trainer.config.settled.micro_batch import HALVE_VARIABLE
from stillhouse.student_trainer.run_dir import EXIT_FAILED
from stillhouse.student_trainer.train.process.causes import explain
from stillhouse.student_trainer.train.process.memory import memory_of
from tests.conftest import Models
from tests.student_trainer.train.runs import events, finish_here, make_run, spec_of
from tests.support.small_models import make_model

HUGE = 1 << 46


def raised(do: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:
        do()
    return caught.value


def no_child() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def map_weights() -> None:
    raise ValueError(
        "unable to mmap 8589934592 bytes from file <model.safetensors>: Cannot allocate memory (12)"
    )


@pytest.mark.parametrize(
    "do",
    [
        lambda: torch.empty(HUGE),
        lambda: torch.zeros(1).expand(HUGE).contiguous(),
        lambda: np.empty(HUGE),
        lambda: bytearray(HUGE << 8),
        lambda: pa.allocate_buffer(HUGE << 8),
        no_child,
        map_weights,
    ],
)
def test_exhausted_memory_is_told_from_a_bug(do: Callable[[], Any], tmp_path: Path) -> None:
    plain = raised(do)
    below = StillhouseError(Reason.MODEL_NOT_FOUND, "The student cannot be loaded.")
    below.__cause__ = plain
    for error in (plain, below):
        found = explain(error, tmp_path)
        assert isinstance(found, StillhouseError)
        assert found.reason is Reason.OUT_OF_MEMORY
        assert "resume RUN --set optimizer.micro_batch_tokens" in found.message
    bug = RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
    assert explain(bug, tmp_path) is bug


def test_the_innermost_work_names_the_error() -> None:
    with (
        pytest.raises(
            StillhouseError, match=r"^The pass ran out of memory \(.*DefaultCPUAllocator"
        ) as caught,
        memory_of(lambda: "The run"),
        memory_of(lambda: "The pass"),
    ):
        torch.empty(HUGE)
    assert caught.value.reason is Reason.OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="invalid"), memory_of(lambda: "The run"):
        torch.zeros(2).view(3)


@contextmanager
def memory_left(num_bytes: int) -> Iterator[None]:
    """Lets this process take `num_bytes` more of address space."""
    gc.collect()  # what earlier tests left would become room later
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.model
@pytest.mark.faults(row=8)
def test_a_pass_that_does_not_fit_is_named_and_its_half_fits(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = make_model(
        tmp_path / "wide",
        tokenizer_dir=models.student,
        hidden_size=32,
        num_layers=2,
        num_heads=1,
        intermediate_size=2048,
    )
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"text": " ".join(models.texts[:40])}) + "\n") * 32)
    spec = spec_of(
        wide,
        data,
        None,
        data={"eval_fraction": 0, "max_sequence_tokens": 256},
        loss={"terms": [{"weight": 0}], "hard_weight": 1},
        optimizer={"micro_batch_size": 32, "grad_accum_steps": 1, "max_steps": 1},
    )
    run_dir = make_run(tmp_path, "wide", spec)
    # Two layers keep four activations each of 64 MiB.
    with memory_left(400 * 2**20):
        code = finish_here(run_dir)
    assert code == EXIT_FAILED
    error = from_status(from_json(events(run_dir, "failed")[-1]["error"]))
    assert error.reason is Reason.OUT_OF_MEMORY
    expected = "A forward and backward pass of step 1 (32 rows, 8192 tokens with padding, the longest row 256) ran out of memory ("
    assert error.message.startswith(expected), error.message
    assert "DefaultCPUAllocator" in error.message
    monkeypatch.setenv(HALVE_VARIABLE, "1")
    with memory_left(400 * 2**20):
        assert finish_here(run_dir, 2) == 0
