"""Encodes rows for `stillhouse data inspect` with the code that encodes them for training; a process of its own.

Reads requests on standard input until it ends, and answers each on standard output. A request is its length, 8 bytes, most
significant first, and an InspectRowsRequest; an answer is a byte, its length and an InspectRowsResponse after ENCODED, or a
google.rpc.Status after REFUSED. The run service, which never imports torch or a tokenizer, starts it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import StillhouseError, to_status
from stillhouse.protos.rows.field_error import kind_of
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.student_trainer.config.proto import with_defaults
from stillhouse.student_trainer.config.rules.teacher_prompt import prompt_fields
from stillhouse.student_trainer.config.schema import DataConfig, RunConfig
from stillhouse.student_trainer.train.data.encoding import RowEncoder
from stillhouse.student_trainer.train.data.readers import DatasetRow
from stillhouse.student_trainer.train.data.token_texts import token_bytes
from stillhouse.student_trainer.train.student.loading import model_source
from stillhouse.student_trainer.train.student.student import load_tokenizer

ENCODED, REFUSED = b"\0", b"\1"
LENGTH_BYTES = 8


def main() -> None:
    """Answers the requests on standard input; libraries that print go to standard error."""
    inspector = Inspector(Path(sys.argv[1]))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with out:
        while head := sys.stdin.buffer.read(LENGTH_BYTES):
            try:
                request = pb.InspectRowsRequest.FromString(sys.stdin.buffer.read(int.from_bytes(head)))
                kind, answer = ENCODED, inspector.inspect(request).SerializeToString()
            except StillhouseError as error:
                kind, answer = REFUSED, to_status(error).SerializeToString()
            out.write(kind + len(answer).to_bytes(LENGTH_BYTES) + answer)
            out.flush()


class Inspector:
    """Encodes the rows of requests; the tokenizer of the last request's settings is kept while its files are unchanged."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._key: tuple[bytes, Any] | None = None
        self._tokenizer: Any = None

    def inspect(self, request: pb.InspectRowsRequest) -> pb.InspectRowsResponse:
        """Encodes the rows of a request with the tokenizer of its student. Raises StillhouseError for the whole of it."""
        config = with_defaults(request.spec)
        tokenizer = self._load(request.spec, config)
        prompts = [each.prompt for each in config.teachers if each.prompt is not None]
        fields = set[str]().union(*(prompt_fields(each) for each in prompts))
        encoder = RowEncoder.of(config.data, tokenizer, own_fields=fields)
        texts = token_bytes(tokenizer) if any(row.in_full for row in request.rows) else {}
        return pb.InspectRowsResponse(
            rows=[_encode(row, encoder, config.data, texts) for row in request.rows],
            max_sequence_tokens=config.data.max_sequence_tokens,
            notes=encoder.notes,
        )

    def _load(self, spec: pb.RunSpec, config: RunConfig) -> Any:
        key = spec.SerializeToString(deterministic=True), self._files(config)
        if key != self._key:
            template = config.data.chat_template
            self._tokenizer = load_tokenizer(config.student, self._data_dir, chat_template=template)
            self._key = key
        return self._tokenizer

    def _files(self, config: RunConfig) -> list[tuple[str, int, int]]:
        """Name, size and time of each of the model's files."""
        folder = Path(model_source(config.student, self._data_dir))
        if not folder.is_dir():
            return []  # a hub id
        found = ((each.name, each.stat()) for each in folder.iterdir())
        return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def _encode(
    row: pb.InspectedRow, encoder: RowEncoder, data: DataConfig, texts: dict[int, bytes]
) -> pb.RowEncoding:
    answer = pb.RowEncoding(number=row.number)
    try:
        token_ids, mask = encoder.encode(_parsed(row))
    except StillhouseError as error:
        answer.field = error.metadata.get("field", "(the row)")
        answer.problem = error.message.partition(f"field {answer.field}: ")[2] or error.message
        return answer
    limit = data.max_sequence_tokens
    answer.num_tokens = len(token_ids)
    answer.num_targets = sum(mask[:limit])
    if row.in_full:
        answer.token_ids.extend(token_ids)
        answer.token_bytes.extend(texts.get(each, b"") for each in token_ids)
        answer.targets.extend(each and at < limit for at, each in enumerate(mask))
    return answer


def _parsed(row: pb.InspectedRow) -> DatasetRow:
    """Returns the row to encode. Raises StillhouseError(DATASET_INVALID)."""
    read = DatasetRow(path=Path("rows"), number=row.number, values={})
    try:
        values = json.loads(row.json)
    except (ValueError, RecursionError) as error:
        raise read.invalid("(the row)", f"is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise read.invalid("(the row)", f"is {kind_of(values)}; it must be a JSON object.")
    return DatasetRow(path=read.path, number=row.number, values=values)


if __name__ == "__main__":
    main()
