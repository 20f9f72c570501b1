"""Encodes rows in a process of its own, which has the tokenizer; one request at a time, bounded in size and in time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import structlog
from google.rpc import status_pb2

from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.student_trainer.config import proto
from stillhouse.student_trainer.config.checks import invalid_spec, problems_of
from stillhouse.student_trainer.runs.api.encoding_process import TIMEOUT_S, EncodingProcess
from stillhouse.student_trainer.runs.api.hub_lookup import hub_problems
from stillhouse.student_trainer.runs.api.pages import bounded
from stillhouse.student_trainer.runs.api.spec_resolution import Host, resolve_datasets, resolve_rendering
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.supervision.training_process import environment

log = structlog.get_logger()

MAX_ROWS = 4096
MAX_ROWS_BYTES = 8 << 20
"""Rows of one request."""
_FAILED = 3
"""Exit code of a refusal: that of train/inspect_dataset.py."""
_DATASET = "stillhouse.student_trainer.train.inspect_dataset"
MOST_SHOWN, MOST_SAMPLED = 20, 1000
MOST_TOKENS = 4096
"""Tokens that are returned of one row of a dataset."""
_LENGTH_BYTES = 8
"""Size of lengths: that of train/inspect_dataset.py."""
DEFAULT_READ, MOST_READ = 100_000, 1_000_000
"""Rows of a dataset that are read."""


class RowInspection:
    """Encodes rows for clients."""

    def __init__(self, host: Host, db: DatabaseThread) -> None:
        """`db` is the thread in which uploaded datasets are found."""
        self._host, self._db = host, db
        self._turn = asyncio.Semaphore(1)
        self._process = EncodingProcess(host.data_dir)

    async def inspect(self, request: pb.InspectRowsRequest) -> pb.InspectRowsResponse:
        """Returns what a run with the request's settings would train on.

        Raises StillhouseError: INVALID_REQUEST above the limits, INVALID_SPEC for the settings, MODEL_NOT_FOUND,
        TOKENIZER_INVALID.
        """
        size = sum(len(row.json) for row in request.rows)
        if len(request.rows) > MAX_ROWS or size > MAX_ROWS_BYTES:
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"The request has {len(request.rows)} rows of {size} characters; at most {MAX_ROWS} rows of "
                f"{MAX_ROWS_BYTES} characters are inspected at once. Send fewer.",
            )
        resolved = pb.InspectRowsRequest(spec=await self._settled(request.spec), rows=request.rows)
        async with self._turn:
            answer = await self._process.ask(resolved.SerializeToString())
        return pb.InspectRowsResponse.FromString(answer)

    async def inspect_dataset(self, request: pb.InspectDatasetRequest) -> pb.InspectDatasetResponse:
        """Returns what a dataset holds, and what a run with the request's settings would make of it.

        Raises StillhouseError: INVALID_REQUEST outside of the limits, INVALID_SPEC for the settings and for a dataset that no
        run could name, DATASET_NOT_FOUND, DATASET_INVALID, MODEL_NOT_FOUND, TOKENIZER_INVALID.
        """
        shown = bounded("num_rows", request.num_rows, 1, MOST_SHOWN)
        sampled = bounded("sample_rows", request.sample_rows, 0, MOST_SAMPLED)
        read = bounded("max_rows", request.max_rows, DEFAULT_READ, MOST_READ)
        bounded("first_row", request.first_row, 1, read)
        spec = await self._settled(request.spec) if request.spec.student.model else request.spec
        resolved = pb.InspectDatasetRequest(
            dataset=await self._located(request.dataset),
            spec=spec,
            first_row=request.first_row,
            num_rows=shown,
            sample_rows=sampled,
            max_rows=read,
        )
        async with self._turn:
            out = await self._read(resolved.SerializeToString())
            end = _LENGTH_BYTES + int.from_bytes(out[:_LENGTH_BYTES])
            response = pb.InspectDatasetResponse.FromString(out[_LENGTH_BYTES:end])
            if pb.InspectRowsRequest.FromString(out[end:]).rows:
                encoding = pb.InspectRowsResponse.FromString(await self._process.ask(out[end:]))
                response.encoding.CopyFrom(_shortened(encoding))
        return response

    async def _located(self, dataset: pb.DatasetSpec) -> pb.DatasetSpec:
        """Returns the dataset with its path on this host. Raises StillhouseError(INVALID_SPEC)."""
        config = await asyncio.to_thread(proto.with_defaults, pb.RunSpec(data=pb.DataSpec(train=[dataset])))
        place = "data.train[0]"
        problems = [
            each
            for each in await asyncio.to_thread(problems_of, config)
            if each.field.startswith(f"{place}.")
        ]
        found = await self._db(resolve_datasets, config, self._host, problems)
        problems = [*found.problems, *await asyncio.to_thread(hub_problems, found.hub_ids)]
        if problems:
            named = [replace(each, field=each.field.replace(place, "dataset")) for each in problems]
            raise invalid_spec(named)
        settled = pb.RunSpec()
        proto.write(found.config, settled)
        return settled.data.train[0]

    async def _settled(self, spec: pb.RunSpec) -> pb.RunSpec:
        """Returns the settings with paths of this host. Raises StillhouseError(INVALID_SPEC)."""
        config = await asyncio.to_thread(proto.with_defaults, spec)
        # Only what decides on the encoding: a run file may lack the rest so far.
        about = ("student.model", "student.revision", "data.")
        problems = [
            each
            for each in await asyncio.to_thread(problems_of, config)
            if each.field.startswith(about) and not each.field.startswith(("data.train", "data.eval"))
        ]
        found = await asyncio.to_thread(resolve_rendering, config, self._host, problems)
        problems = [*found.problems, *await asyncio.to_thread(hub_problems, found.hub_ids)]
        if problems:
            raise invalid_spec(problems)
        student, data = found.config.student, replace(found.config.data, train=(), eval=())
        settled = pb.RunSpec()
        proto.write(replace(found.config, student=student, data=data), settled)
        return settled

    async def close(self) -> None:
        """Ends the process that is kept for further rows."""
        await self._process.close()

    async def _read(self, request: bytes) -> bytes:
        """The answer of train/inspect_dataset.py's process to a request. Raises the error that it ends with."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", _DATASET, str(self._host.data_dir)),
            cwd=self._host.data_dir,
            env=environment(devices=(), threads=1, credentials=Path(os.devnull)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, said = await asyncio.wait_for(process.communicate(request), TIMEOUT_S)
        except TimeoutError as error:
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"The dataset was not read within {TIMEOUT_S:g} s. Let fewer rows be read.",
            ) from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode == _FAILED:
            raise from_status(status_pb2.Status.FromString(out))
        if process.returncode:
            tail = said.decode(errors="replace").strip().splitlines()[-1:]
            log.error(
                "a dataset was not read", exit=process.returncode, said=said.decode(errors="replace")[-2000:]
            )
            raise StillhouseError(
                Reason.INTERNAL,
                f"The process that reads datasets ended with exit code {process.returncode} ({' '.join(tail)}); see the "
                "service's log.",
            )
        return out


def _shortened(encoding: pb.InspectRowsResponse) -> pb.InspectRowsResponse:
    """The encoding with at most MOST_TOKENS tokens of each row."""
    for row in encoding.rows:
        del row.token_ids[MOST_TOKENS:]
        del row.token_bytes[MOST_TOKENS:]
        del row.targets[MOST_TOKENS:]
    return encoding
