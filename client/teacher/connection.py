"""Connection to one teacher service: its info, limits and tokenizer."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from stillhouse.client.core.connection import Connection
from stillhouse.client.core.settings import DEFAULT_TEACHER
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub

MAX_TOKENIZER_BYTES = 256 << 20


class TeacherConnection(Connection):
    """A channel to the teacher at `target`."""

    service = "teacher"

    def __init__(self, target: str = DEFAULT_TEACHER, **options: Any) -> None:
        super().__init__(target, **options)
        self.stub = TeacherServiceStub(self.channel)

    def info(self, *, timeout_s: float | None = None) -> teacher_pb2.GetTeacherInfoResponse:
        """Queries the loaded model, its fingerprints, limits, capabilities and adapters."""
        request = teacher_pb2.GetTeacherInfoRequest()
        return self.call(self.stub.GetTeacherInfo, request, timeout_s=timeout_s)

    @cached_property
    def limits(self) -> teacher_pb2.GetTeacherInfoResponse:
        """Result of info(), queried once."""
        return self.info()

    def refresh(self, *, timeout_s: float | None = None) -> teacher_pb2.GetTeacherInfoResponse:
        """Queries info() again: after a teacher was lost it may be another."""
        self.limits = self.info(timeout_s=timeout_s)
        return self.limits

    @property
    def was_reached(self) -> bool:
        """True once info was received."""
        return "limits" in self.__dict__

    def tokenizer(self) -> dict[str, bytes]:
        """Downloads the tokenizer's files, by name."""
        files: dict[str, bytearray] = {}
        name, size = "", 0
        request = teacher_pb2.GetTokenizerRequest()
        for chunk in self.stream(self.stub.GetTokenizer, request):
            name = chunk.file_name or name
            size += len(chunk.data)
            if Path(name).name != name or not name or name.startswith(".") or size > MAX_TOKENIZER_BYTES:
                raise StillhouseError(
                    Reason.TOKENIZER_INVALID,
                    f"the teacher sent {name!a} as a file of its tokenizer, {size} bytes so far; only plain file names and at "
                    f"most {MAX_TOKENIZER_BYTES} bytes are accepted.",
                )
            files.setdefault(name, bytearray()).extend(chunk.data)
        return {name: bytes(content) for name, content in files.items()}
