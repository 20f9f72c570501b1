"""Routes of files and batches."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from stillhouse.client.batch.openai_input import INTERFACES
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names, integer, invalid, read_json
from stillhouse.client.web.openai.batches.batch import PREFIX as BATCH_PREFIX
from stillhouse.client.web.openai.batches.batch import Batch
from stillhouse.client.web.openai.batches.folder import BatchFolder, disk_error, new_id
from stillhouse.client.web.openai.batches.runner import Batches
from stillhouse.client.web.openai.batches.stored_files import StoredFiles
from stillhouse.client.web.openai.batches.upload import receive
from stillhouse.client.web.openai.errors import PREFIX
from stillhouse.client.web.openai.fields import Body, unicode_text
from stillhouse.client.web.openai.models import Models
from stillhouse.client.web.problems import JsonResponse
from stillhouse.client.web.security.callers import Caller
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.field_error import shown

MAX_FILE_BYTES = 2**30
MAX_UPLOADS = 8
"""Files that arrive at once."""
PURPOSE = "batch"
MAX_LISTED = {"files": 10_000, "batches": 100}
MAX_METADATA, MAX_METADATA_CHARACTERS = 16, 512
MAX_WINDOW_HOURS = 31 * 24
_WINDOW = re.compile(r"([1-9][0-9]{0,2})([hd])")
_CONTENT_TYPE = "application/jsonl"


@dataclass(frozen=True, slots=True)
class Store:
    """The folder of a server that has one, and what is in it."""

    folder: BatchFolder
    files: StoredFiles
    batches: Batches


class BatchRoutes:
    """Handlers of the paths."""

    def __init__(self, context: WebContext, models: Models) -> None:
        """Opens the folder of the settings, if there is one. Raises StillhouseError(INVALID_REQUEST)."""
        self._context, self._models = context, models
        self._store: Store | None = None
        self._uploads = 0
        if context.settings.batch_dir is not None:
            folder = BatchFolder(context.settings.batch_dir)
            files = StoredFiles(folder, context.settings.batch_max_bytes)
            batches = Batches(folder, files, context.upstream, models)
            batches.start()
            self._store = Store(folder, files, batches)

    async def close(self) -> None:
        """Ends the processes of batches; the next server goes on with them."""
        if self._store is not None:
            await self._store.batches.close()
            self._store.folder.close()

    def routes(self) -> tuple[tuple[str, str, Callable[[Request], Awaitable[Response]]], ...]:
        """Method, path and handler of each route."""
        files, batches = f"{PREFIX}/files", f"{PREFIX}/batches"
        return (
            ("POST", files, self.upload),
            ("GET", files, self.list_files),
            ("GET", f"{files}/{{file}}", self.get_file),
            ("DELETE", f"{files}/{{file}}", self.delete_file),
            ("GET", f"{files}/{{file}}/content", self.content),
            ("POST", batches, self.create),
            ("GET", batches, self.list_batches),
            ("GET", f"{batches}/{{batch}}", self.get_batch),
            ("POST", f"{batches}/{{batch}}/cancel", self.cancel),
        )

    async def upload(self, request: Request) -> Response:
        """Stores a file."""
        check_names(request.query_params, ())
        store, owner, _ = await self._opened(request)
        store.files.check_room(owner)
        if self._uploads >= MAX_UPLOADS:
            raise StillhouseError(
                Reason.TOO_MANY_CALLS, f"{MAX_UPLOADS} files arrive; wait for some.", retry_after_s=1.0
            )
        self._uploads += 1
        try:
            limit = min(MAX_FILE_BYTES, store.files.room_bytes, self._context.settings.max_upload_bytes)
            upload = await receive(request, store.folder.uploads, max(0, limit))
        finally:
            self._uploads -= 1
        try:
            _check_form(upload.has_file, upload.fields)
            store.files.check_room(owner, upload.path.stat().st_size)
            add = partial(
                store.files.add,
                owner,
                upload.path,
                filename=upload.filename,
                purpose=upload.fields["purpose"],
            )
            return JsonResponse((await asyncio.to_thread(add)).document())
        except OSError as error:
            raise disk_error(error) from error
        finally:
            with suppress(FileNotFoundError):
                upload.path.unlink()

    async def list_files(self, request: Request) -> Response:
        """The caller's files."""
        check_names(request.query_params, ("limit", "after", "order", "purpose"))
        store, owner, _ = await self._opened(request)
        found = store.files.of(owner, request.query_params.get("purpose"))
        return _page(request, "files", [each.document() for each in found])

    async def get_file(self, request: Request) -> Response:
        """One of them."""
        check_names(request.query_params, ())
        store, owner, _ = await self._opened(request)
        return JsonResponse(store.files.get(owner, request.path_params["file"]).document())

    async def delete_file(self, request: Request) -> Response:
        """Removes a file that no batch reads."""
        check_names(request.query_params, ())
        store, owner, _ = await self._opened(request)
        file = store.files.get(owner, request.path_params["file"])
        if store.batches.uses(file.id):
            raise StillhouseError(
                Reason.REQUEST_CONFLICT, f"A batch reads {file.id}; cancel it, or wait for its end."
            )
        await asyncio.to_thread(store.files.delete, file)
        return JsonResponse({"id": file.id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        """The bytes of a file."""
        check_names(request.query_params, ())
        store, owner, _ = await self._opened(request)
        file = store.files.get(owner, request.path_params["file"])
        return FileResponse(
            store.files.path_of(file),
            media_type=_CONTENT_TYPE,
            filename=f"{file.id}.jsonl",
            headers={"cache-control": "no-store"},
        )

    async def create(self, request: Request) -> Response:
        """Begins a batch."""
        check_names(request.query_params, ())
        store, owner, caller = await self._opened(request)
        batch = _read_batch(await read_json(request), owner)
        file = store.files.get(owner, batch.input_file_id)
        if file.purpose != PURPOSE:
            raise invalid(
                "input_file_id", f'the file has the purpose "{file.purpose}"; upload one for "{PURPOSE}".'
            )
        try:
            await store.batches.create(batch, caller)
        except OSError as error:
            raise disk_error(error) from error
        return JsonResponse(batch.document())

    async def list_batches(self, request: Request) -> Response:
        """The caller's batches."""
        check_names(request.query_params, ("limit", "after"))
        store, owner, _ = await self._opened(request)
        return _page(request, "batches", [each.document() for each in store.batches.of(owner)])

    async def get_batch(self, request: Request) -> Response:
        """One of them."""
        check_names(request.query_params, ())
        store, owner, _ = await self._opened(request)
        return JsonResponse(store.batches.get(owner, request.path_params["batch"]).document())

    async def cancel(self, request: Request) -> Response:
        """Ends a batch with what is done."""
        check_names(request.query_params, ())
        store, owner, _ = await self._opened(request)
        batch = store.batches.get(owner, request.path_params["batch"])
        await store.batches.cancel(batch)
        return JsonResponse(batch.document())

    async def _opened(self, request: Request) -> tuple[Store, str, Caller]:
        """The store for a caller that a teacher lets in. Raises StillhouseError(CAPABILITY) without a folder."""
        caller = self._context.callers.of(request)
        if self._store is None:
            raise StillhouseError(
                Reason.CAPABILITY,
                "This server keeps no files and runs no batches; start it with --batch-dir DIRECTORY, or use `stillhouse generate "
                "--in FILE`.",
            )
        await self._models.all(caller)
        self._store.batches.came(caller)
        return self._store, self._store.folder.owner_of(caller), caller


def _check_form(has_file: bool, fields: dict[str, str]) -> None:
    """Raises StillhouseError(INVALID_REQUEST)."""
    if not has_file:
        raise invalid("file", "it is missing; send the file as a part of this name.")
    for name in fields:
        if name != "purpose":
            raise invalid(name[:80], "there is no such field here; leave it out.")
    if fields.get("purpose") != PURPOSE:
        raise invalid("purpose", f'it is {shown(fields.get("purpose"))}; "{PURPOSE}" is served.')


def _read_batch(values: dict[str, Any], owner: str) -> Batch:
    """A new batch from a body. Raises StillhouseError(INVALID_REQUEST)."""
    body = Body(values)
    endpoint = body.text("endpoint", most=100)
    if endpoint not in INTERFACES:
        raise invalid("endpoint", f"it is {shown(endpoint)}; {' and '.join(INTERFACES)} are served.")
    window = body.text("completion_window", most=10)
    match = _WINDOW.fullmatch(window)
    hours = int(match[1]) * {"h": 1, "d": 24}[match[2]] if match else 0
    if not 0 < hours <= MAX_WINDOW_HOURS:
        raise invalid(
            "completion_window", f"it is {shown(window)}; give hours or days up to 31d, such as 24h."
        )
    now = int(time.time())
    metadata = _metadata(body.take("metadata"))
    batch = Batch(
        id=new_id(BATCH_PREFIX),
        owner=owner,
        endpoint=endpoint,
        input_file_id=body.text("input_file_id", most=100),
        completion_window=window,
        created_at=now,
        expires_at=now + hours * 3600,
        metadata=metadata,
    )
    body.end()
    return batch


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise invalid("metadata", f"give an object of at most {MAX_METADATA} texts.")
    for name, text in value.items():
        if (
            len(unicode_text(text, "metadata")) > MAX_METADATA_CHARACTERS
            or len(unicode_text(name, "metadata")) > 64
        ):
            raise invalid(
                "metadata",
                f"a text has more than {MAX_METADATA_CHARACTERS} characters, or a name more than 64.",
            )
    return dict(value)


def _page(request: Request, kind: str, found: Sequence[dict[str, Any]]) -> Response:
    """A page of a list, by OpenAI's cursor."""
    query = request.query_params
    order, after = query.get("order", "desc"), query.get("after")
    if order not in ("asc", "desc"):
        raise invalid("order", f"it is {shown(order)}; give asc or desc.")
    limit = integer("limit", query.get("limit", "20"), least=1)
    if limit > MAX_LISTED[kind]:
        raise invalid("limit", f"it is {limit}; give at most {MAX_LISTED[kind]}.")
    listed = list(found if order == "desc" else reversed(found))
    if after is not None:
        ids = [each["id"] for each in listed]
        if after not in ids:
            raise invalid("after", f"there is no {after[:80]!r} among them.")
        listed = listed[ids.index(after) + 1 :]
    shown_ones = listed[:limit]
    return JsonResponse(
        {
            "object": "list",
            "data": shown_ones,
            "first_id": shown_ones[0]["id"] if shown_ones else None,
            "last_id": shown_ones[-1]["id"] if shown_ones else None,
            "has_more": len(listed) > limit,
        }
    )
