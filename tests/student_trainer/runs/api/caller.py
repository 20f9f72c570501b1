"""Calls a real run service and waits for its runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import save_file

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error
from stillhouse.protos.rpc.channel import connect
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceStub
from stillhouse.student_trainer.runs.store.run_state import ENDED

PATIENCE_S = 120.0


def model_of_no_kind(folder: Path) -> Path:
    """Makes a model directory below `folder` that a run can name and no process can load."""
    path = folder / "unknown"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "nothing"}')
    save_file({"weight": np.zeros(1)}, path / "model.safetensors")
    return path


@contextmanager
def stub_for(target: str) -> Iterator[RunServiceStub]:
    """A stub with its own channel."""
    with connect(target) as channel:
        yield RunServiceStub(channel)


@contextmanager
def refused(reason: Reason) -> Iterator[list[StillhouseError]]:
    """Expects the block to fail with `reason`; the list then holds the error."""
    caught: list[StillhouseError] = []
    with pytest.raises(grpc.RpcError) as info:
        yield caught
    caught.append(from_rpc_error(info.value, target="", service="trainer"))
    assert caught[0].reason is reason, caught[0]


def watch(stub: RunServiceStub, name: str, after: int = 0) -> list[pb.WatchRunResponse]:
    """Every event after `after`, until the run has ended."""
    return list(stub.WatchRun(pb.WatchRunRequest(name=name, after_sequence=after), timeout=PATIENCE_S))


def wait_ended(stub: RunServiceStub, name: str) -> pb.Run:
    """The run once it has ended."""
    watch(stub, name)
    run = stub.GetRun(pb.GetRunRequest(name=name))
    assert run.state in ENDED
    return run


def wait_step(stub: RunServiceStub, name: str, step: int, *, attempt: int = 1) -> int:
    """Waits until an attempt has taken step `step` or a later one; returns the sequence of its event."""
    call: Any = stub.WatchRun(pb.WatchRunRequest(name=name), timeout=PATIENCE_S)
    for event in call:
        if event.metrics.attempt >= attempt and event.metrics.step >= step:
            call.cancel()
            return int(event.sequence)
        assert event.run.state not in ENDED, event.run.error.message
    raise AssertionError(f"{name} ended before step {step}")
