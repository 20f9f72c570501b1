"""Rpcs about datasets: uploads, versions, deletion; a token without admin changes only ids and uploads of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.auth import current_caller
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.student_trainer.runs.api import dataset_uploads
from stillhouse.student_trainer.runs.api.pages import page_size, page_token, read_page_token
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.datasets import DATASET_ID, DatasetStore, Reference, is_digest


class DatasetRpcs:
    """Datasets of one data directory."""

    def __init__(self, store: DatasetStore, db: DatabaseThread, folder: Path, *, max_bytes: int) -> None:
        """`folder` holds the files."""
        self._store = store
        self._db = db
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = asyncio.Lock()

    async def upload(self, chunks: AsyncIterator[pb.UploadDatasetRequest]) -> pb.UploadDatasetResponse:
        """Stores a file by its content, and as the next version of an id if there is one."""
        async with (
            dataset_uploads.received(
                self._folder, chunks, check=self._check_upload, max_bytes=self._max_bytes
            ) as (upload, path),
            self._changed(upload.sha256),
        ):
            await self._check_id_owner(upload.dataset_id)  # another upload may have come first
            suffix = await self._db(self._store.suffix_of, upload.sha256)
            stored = await asyncio.to_thread(dataset_uploads.keep, self._folder, path, upload, suffix)
            dataset = await self._db(self._store.add, stored, owner=current_caller().name)
        return pb.UploadDatasetResponse(
            name=f"datasets/{upload.sha256}", size_bytes=upload.size_bytes, dataset=dataset
        )

    @asynccontextmanager
    async def _changed(self, digest: str) -> AsyncIterator[None]:
        """The block in which a file and its row come or go, one at a time: both or none, also after a kill."""
        async with self._lock:
            await asyncio.to_thread(dataset_uploads.begin_change, self._folder, digest)
            try:
                yield
            finally:
                # In the thread of the store, and so behind what a cancelled call has left to it.
                await self._db(dataset_uploads.end_change, self._folder, digest, has_row=self._store.has_file)

    async def _check_upload(self, first: pb.UploadDatasetRequest) -> None:
        """Checks what the first chunk says about a dataset, before any of its bytes are stored."""
        for field in ("num_rows", "num_tokens"):
            if getattr(first, field) < 0:
                raise StillhouseError(
                    Reason.INVALID_REQUEST,
                    f"{field} is {getattr(first, field)}; give at least 1, or 0 if it is unknown.",
                )
        if first.dataset_id:
            _check_id(first.dataset_id)
            await self._check_id_owner(first.dataset_id)

    async def _check_id_owner(self, dataset_id: str) -> None:
        caller = current_caller()
        owners = await self._db(self._store.owners, dataset_id)
        if not caller.is_admin and owners - {caller.name}:
            raise StillhouseError(
                Reason.PERMISSION_DENIED,
                f'The dataset {dataset_id} has versions of other clients than the token "{caller.name}"; choose another id, '
                "or use a token with the scope admin.",
            )

    async def list(self, request: pb.ListDatasetsRequest) -> pb.ListDatasetsResponse:
        """Returns a page of datasets, newest first."""
        if request.dataset_id:
            _check_id(request.dataset_id)
        before = read_page_token(request.page_token, request.dataset_id)
        size = page_size(request.page_size)
        found, following = await self._db(self._store.page, request.dataset_id, before=before, limit=size)
        return pb.ListDatasetsResponse(
            datasets=found, next_page_token=page_token(following, request.dataset_id)
        )

    async def get(self, request: pb.GetDatasetRequest) -> pb.Dataset:
        """Returns one dataset, with the runs that use it."""
        return await self._db(self._store.get, _reference(request.name))

    async def delete(self, request: pb.DeleteDatasetRequest) -> pb.DeleteDatasetResponse:
        """Deletes a dataset that no live run uses, and its file if nothing else needs it."""
        reference = _reference(request.name)
        if reference.version is None:
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"{request.name[:80]!r} names no version; give the one to delete, such as {request.name[:80]}@1.",
            )
        dataset = await self._db(self._store.get, reference)
        async with self._changed(dataset.sha256):
            _check_owner(await self._db(self._store.get, reference))
            await self._db(self._store.delete, reference)
        return pb.DeleteDatasetResponse()


def _check_owner(dataset: pb.Dataset) -> None:
    caller = current_caller()
    if not caller.is_admin and dataset.owner != caller.name:
        raise StillhouseError(
            Reason.PERMISSION_DENIED,
            f'{dataset.name} was not uploaded with the token "{caller.name}"; to delete it, use the one that did, or one '
            "with the scope admin.",
        )


def _check_id(dataset_id: str) -> None:
    if is_digest(dataset_id) or not DATASET_ID.fullmatch(dataset_id):
        raise StillhouseError(
            Reason.INVALID_REQUEST,
            f"{dataset_id[:80]!r} is no id of a dataset; use at most 64 letters, digits, '.', '_' and '-' that begin with a "
            "letter or a digit and are no SHA-256, such as 'gsm8k'.",
        )


def _reference(name: str) -> Reference:
    reference = Reference.parse(name)
    if reference is None:
        raise StillhouseError(
            Reason.INVALID_REQUEST,
            f"{name[:80]!r} is not a dataset's name; use one such as 'datasets/gsm8k@2', or 'datasets/' and a SHA-256.",
        )
    return reference
