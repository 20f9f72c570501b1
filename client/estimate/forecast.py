"""Forecast of a run: the memory that its student, and a teacher beside it, take of a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from stillhouse.client.estimate.memory import (
    MemoryPlan,
    is_beside_trainer,
    num_sharing,
    remedies,
    student_bytes,
    teacher_bytes,
)
from stillhouse.client.estimate.model_shape import ModelShape
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A teacher to forecast, too."""

    shape: ModelShape
    dtype_bytes: float
    apart: bool
    """True if it has a device of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Bytes by purpose, and whether they fit."""

    device: str
    """ "cpu" or "gpu"."""
    limit: int
    """Bytes that the device has."""
    parameters: int
    """Weights of the student."""
    parts: dict[str, dict[str, int]]
    """Bytes by purpose, of "student" and perhaps "teacher"."""
    copies: int
    """Training processes that share the device."""
    is_beside: bool
    """True if the teacher shares it, too."""
    helps: list[tuple[str, int]]
    """Changes that lower the student's memory, and the bytes that it then takes; none if all fits."""

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of student and teacher."""
        return {name: sum(each.values()) for name, each in self.parts.items()}

    @property
    def others(self) -> int:
        """Bytes of what shares the device with the training processes."""
        return self.totals["teacher"] if self.is_beside else 0

    @property
    def together(self) -> int:
        """Bytes of all that shares the device."""
        return self.copies * self.totals["student"] + self.others

    @property
    def fits(self) -> bool:
        """True if everything fits."""
        return max(*self.totals.values(), self.together) <= self.limit

    def would_fit(self, student: int) -> bool:
        """True if the device had room for students of so many bytes."""
        return self.copies * student + self.others <= self.limit

    def as_json(self) -> dict[str, Any]:
        """The forecast as a JSON object."""
        document: dict[str, Any] = {
            "device": self.device,
            "memory_bytes": self.limit,
            "parameters": self.parameters,
            "remedies": [{"set": text, "student_bytes": then} for text, then in self.helps],
            "together": {
                "students": self.copies,
                "teacher": self.is_beside,
                "total_bytes": self.together,
            },
            "fits": self.fits,
        }
        for name, each in self.parts.items():
            total = self.totals[name]
            document[name] = {"total_bytes": total, "fits": total <= self.limit, "parts_bytes": each}
        return document


def forecast(
    spec: RunSpec, shape: ModelShape, *, device: str, limit: int, teacher: Teacher | None = None
) -> Forecast:
    """Predicts the memory of the run. Raises StillhouseError(INVALID_REQUEST) for an optimizer that is not known.

    Without a `teacher` one whose hidden states are compared is taken for as wide and as deep as the student.
    """
    if spec.student.keep_layers:
        shape = replace(shape, layers=len(spec.student.keep_layers))
    plan = MemoryPlan.from_spec(spec, device).with_hidden(
        spec, shape, shape if teacher is None else teacher.shape
    )
    parts = {"student": student_bytes(shape, plan)}
    if teacher is not None:
        parts["teacher"] = teacher_bytes(
            teacher.shape, dtype_bytes=teacher.dtype_bytes, sequence_tokens=plan.sequence_tokens
        )
    first = Forecast(
        device=device,
        limit=limit,
        parameters=shape.parameters,
        parts=parts,
        copies=num_sharing(spec, device),
        is_beside=teacher is not None and not teacher.apart and is_beside_trainer(spec),
        helps=[],
    )
    if not first.fits:
        first.helps.extend(remedies(shape, plan))
    return first
