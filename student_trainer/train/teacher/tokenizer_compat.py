"""Compatibility of two tokenizers by their files: identical, prefix-compatible or foreign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTokenizerRequest
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson, tokenizer_errors

MAX_TOKENIZER_BYTES = 256 << 20
TOKENIZER_TIMEOUT_S = 60.0
_CUTTING = ("normalizer", "pre_tokenizer")
"""Parts that must be equal, because they split text into tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The relation of two tokenizers."""

    kind: Literal["identical", "compatible", "foreign"]
    shared_size: int
    """Ids below it stand for the same text on both sides; 0 for foreign ones."""
    why: str = ""
    """The first difference of foreign ones."""


def compare(student_json: str | bytes, teacher_json: str | bytes) -> Verdict:
    """Compares two tokenizer.json: compatible if the ids of both are the same tokens, with the same merges and splits.

    One may have more tokens at its end. Raises StillhouseError(TOKENIZER_INVALID) for an unreadable file.
    """
    with tokenizer_errors(
        "The teacher's tokenizer cannot be read",
        "Start it with a model that has a tokenizer.json of the tokenizers library.",
    ):
        student, teacher = TokenizerJson(student_json), TokenizerJson(teacher_json)
        ours, theirs = student.tokens, teacher.tokens
        size = min(max(ours), max(theirs)) + 1
        for number in range(size):
            if ours.get(number) != theirs.get(number):
                return _foreign(
                    f"token id {number} is {ours.get(number)!r} for the student and {theirs.get(number)!r} for the teacher"
                )
        if student.model.get("type") != teacher.model.get("type"):
            return _foreign("they cut words by different methods")
        if student.merges != teacher.merges:
            return _foreign("their merges differ")
        for part in _CUTTING:
            if student.document.get(part) != teacher.document.get(part):
                return _foreign(f"their {part} differs")
    kind: Literal["identical", "compatible"] = "identical" if ours == theirs else "compatible"
    return Verdict(kind=kind, shared_size=size)


def fetch_tokenizer(stub: TeacherServiceStub) -> bytes:
    """Downloads the teacher's tokenizer.json. Raises grpc.RpcError, or StillhouseError(TOKENIZER_INVALID)."""
    content, name = bytearray(), ""
    for piece in stub.GetTokenizer(GetTokenizerRequest(), timeout=TOKENIZER_TIMEOUT_S):
        name = piece.file_name or name
        if name == "tokenizer.json":
            content.extend(piece.data)
        if len(content) > MAX_TOKENIZER_BYTES:
            break
    if not content or len(content) > MAX_TOKENIZER_BYTES:
        raise StillhouseError(
            Reason.TOKENIZER_INVALID,
            f"The teacher sent {len(content)} bytes of tokenizer.json; between 1 and {MAX_TOKENIZER_BYTES} make one.",
        )
    return bytes(content)


def _foreign(why: str) -> Verdict:
    return Verdict(kind="foreign", shared_size=0, why=why)


def foreign_tokenizer(
    student: str, teacher: str, why: str, target: str, *, classes: bool = False
) -> StillhouseError:
    """The error for a foreign tokenizer, with its remedies; `classes` for a classifier."""
    remedy = "Use a student and a teacher of one model family, or copy the teacher's tokenizer to a student that is trained from_config"
    if not classes:
        remedy += "; or set loss.foreign_tokenizer: alm, which compares both by chunks of text (approximate likelihood matching)"
    return StillhouseError(
        Reason.TOKENIZER_MISMATCH,
        f"The student's tokenizer ({student}) differs from that of the teacher at {target} ({teacher}), so their token "
        f"ids stand for different text: {why}. {remedy}.",
        metadata={"student": student, "teacher": teacher},
    )
