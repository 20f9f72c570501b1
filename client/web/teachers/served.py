"""A model that a teacher serves: its own, or one of its adapters."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.client.web.api.messages import invalid
from stillhouse.client.web.upstream import Service
from stillhouse.protos.stillhouse.v1 import teacher_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A model and the teacher that serves it."""

    id: str
    service: Service
    info: teacher_pb2.GetTeacherInfoResponse
    adapter: str = ""
    """Empty for the teacher's own model."""

    def check_top(self, name: str, top_k: int) -> None:
        """Raises StillhouseError(INVALID_REQUEST) if the teacher gives fewer tokens at a position."""
        if top_k > self.info.max_top_k:
            raise invalid(
                name, f"it is {top_k}, and this teacher gives at most {self.info.max_top_k}; lower it."
            )
