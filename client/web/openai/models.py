"""Models of OpenAI's API: the model of each teacher, and its adapters by name."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from stillhouse.client.web.security.callers import Caller
from stillhouse.client.web.teachers.served import Served
from stillhouse.client.web.upstream import Upstream
from stillhouse.protos.errors import FieldViolation, Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2

INFO_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Models:
    """The models of all teachers, as one caller sees them."""

    upstream: Upstream
    created_s: int = field(default_factory=lambda: int(time.time()))

    async def all(self, caller: Caller) -> list[Served]:
        """The models of the teachers that answer, each name once: the first teacher that has it serves it.

        Raises the first teacher's StillhouseError if none answers.
        """
        request = teacher_pb2.GetTeacherInfoRequest()
        teachers = self.upstream.teachers
        answers = await asyncio.gather(
            *(caller.call(each, "GetTeacherInfo", request, timeout_s=INFO_TIMEOUT_S) for each in teachers),
            return_exceptions=True,
        )
        found: dict[str, Served] = {}
        failures = []
        for service, answer in zip(teachers, answers, strict=True):
            if isinstance(answer, BaseException):
                failures.append(answer)
                continue
            if answer.num_classes:
                continue  # a classifier writes no text
            found.setdefault(answer.model, Served(id=answer.model, service=service, info=answer))
            for adapter in answer.adapters:
                named = Served(id=adapter.name, service=service, info=answer, adapter=adapter.name)
                found.setdefault(adapter.name, named)
        if not found and failures:
            raise failures[0]
        return list(found.values())

    def document(self, model: Served) -> dict[str, Any]:
        """A model as the API lists it."""
        document = {
            "id": model.id,
            "object": "model",
            "created": self.created_s,
            "owned_by": "stillhouse",
            "max_model_len": model.info.max_sequence_tokens,
        }
        return document | ({"parent": model.info.model} if model.adapter else {})


def named(models: list[Served], name: str) -> Served:
    """The model of this name. Raises StillhouseError(MODEL_NOT_FOUND)."""
    for each in models:
        if each.id == name:
            return each
    known = ", ".join(each.id for each in models[:10]) or "none"
    sentence = f"there is no model {name[:80]!r}; GET /v1/models lists them: {known[:1000]}."
    raise StillhouseError(
        Reason.MODEL_NOT_FOUND, sentence, violations=[FieldViolation(field="model", description=sentence)]
    )
