"""POST /v1/files: a form of several parts, whose file goes to the disk as it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from stillhouse.client.web.api.messages import content_type, invalid, next_chunk
from stillhouse.client.web.openai.batches.folder import disk_error, new_id
from stillhouse.protos.errors import Reason, StillhouseError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MEDIA_TYPE = "multipart/form-data"
MAX_FIELD_BYTES = 1000
MAX_FIELDS = 8
MAX_HEADER_BYTES = 4096
FILE_FIELD = "file"


@dataclass(kw_only=True, slots=True)
class Upload:
    """A form that has arrived."""

    path: Path
    """The file's content, which whoever receives this moves or removes."""
    filename: str = ""
    has_file: bool = False
    fields: dict[str, str] = field(default_factory=dict)
    """Its other fields."""


async def receive(request: Request, folder: Path, limit: int) -> Upload:
    """Reads a form into a new file in `folder`, of at most `limit` bytes.

    Raises StillhouseError: INVALID_REQUEST, MESSAGE_TOO_LARGE, DISK_FULL, and as `next_chunk` does; nothing is left then.
    """
    if content_type(request) != MEDIA_TYPE:
        raise invalid("", f"the content type is {content_type(request)[:80]!r}; send {MEDIA_TYPE}.")
    _, options = parse_options_header(request.headers["content-type"])
    boundary = options.get(b"boundary", b"")
    if not boundary or len(boundary) > 200:
        raise invalid("", "the content type has no boundary.")
    length = request.headers.get("content-length", "0")
    if (
        length.isdecimal()
        and len(length) < 20
        and int(length) > limit + MAX_FIELDS * (MAX_FIELD_BYTES + MAX_HEADER_BYTES)
    ):
        raise _too_large(limit)
    path = folder / new_id("file-")
    done = False
    try:
        with _disk_errors(), path.open("xb") as file:
            form = _Form(Upload(path=path), file, limit)
            parser = MultipartParser(boundary, form.callbacks())
            chunks = request.stream()
            while chunk := await next_chunk(chunks):
                await asyncio.to_thread(_feed, parser, chunk)
            _feed(parser, b"")
        if not form.ended:
            raise invalid("", "the form ends before its last boundary.")
        done = True
        return form.upload
    finally:
        if not done:
            path.unlink(missing_ok=True)


def _feed(parser: MultipartParser, chunk: bytes) -> None:
    try:
        if chunk:
            parser.write(chunk)
        else:
            parser.finalize()
    except FormParserError as error:
        raise invalid("", f"the form cannot be read ({error}).") from error


class _Form:
    """Takes the parts of a form; one at a time is open."""

    def __init__(self, upload: Upload, file: IO[bytes], limit: int) -> None:
        self.upload, self.ended = upload, False
        self._file, self._limit = file, limit
        self._size = self._fields = 0
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._name: str | None = None
        self._content = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        """Callbacks of the parser."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_header,
            "on_header_value": self._on_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._close,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise invalid("", f"the form has more than {MAX_FIELDS} fields.")
        self._disposition, self._name = b"", None
        self._content.clear()

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_header()

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header) + len(self._value) > MAX_HEADER_BYTES:
            raise invalid("", f"a header in the form has more than {MAX_HEADER_BYTES} bytes.")

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name != FILE_FIELD:
            return
        if self.upload.has_file:
            raise invalid(FILE_FIELD, "it is there twice; send one file.")
        self.upload.has_file = True
        name = options.get(b"filename", b"").decode("utf-8", "replace")
        self.upload.filename = "".join(each for each in name if each.isprintable())

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE_FIELD:
            self._size += end - start
            if self._size > self._limit:
                raise _too_large(self._limit)
            self._file.write(data[start:end])
            return
        self._content += data[start:end]
        if len(self._content) > MAX_FIELD_BYTES:
            raise invalid((self._name or "")[:80], f"it has more than {MAX_FIELD_BYTES} bytes.")

    def _close(self) -> None:
        if self._name is None or self._name == FILE_FIELD:
            return
        if self._name in self.upload.fields:
            raise invalid(self._name[:80], "it is there twice.")
        self.upload.fields[self._name] = self._content.decode("utf-8", "replace")

    def _end(self) -> None:
        self.ended = True


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error) from error


def _too_large(limit: int) -> StillhouseError:
    return StillhouseError(
        Reason.MESSAGE_TOO_LARGE,
        f"The file is larger than {limit} bytes, which is the limit or what is left of the room for all files. Split it, or "
        "delete files.",
    )
