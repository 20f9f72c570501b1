"""Memory of hidden states that `loss.hidden_mse` compares: those of the teacher, copies of the student's, and projections."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stillhouse.client.estimate.model_shape import ModelShape
from stillhouse.client.runfile.schema import setting
from stillhouse.protos.stillhouse.v1.run_pb2 import HiddenSpec, RunSpec

FLOAT_BYTES = 4
MAX_PAIRS = 64
"""Pairs that an empty list of layers is spread over, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenPlan:
    """The comparison of one loss with a teacher."""

    num_pairs: int
    teacher_layers: int
    """Layers of the teacher that are compared, each once."""
    teacher_hidden: int
    """Units of a state of the teacher."""
    normalise: bool
    rows_ahead: int
    """Rows whose states the training process holds at once, those requested ahead included."""

    @classmethod
    def from_spec(
        cls, spec: RunSpec, student: ModelShape, teacher: ModelShape, *, rows: int
    ) -> HiddenPlan | None:
        """The largest comparison of a run with updates of `rows` rows; None if it has none."""
        losses = [spec.loss, *(each.loss for each in spec.contexts if each.HasField("loss"))]
        found = [each.hidden_mse for each in losses if each.HasField("hidden_mse")]
        prefetch = max((setting(each, "prefetch_steps") for each in spec.teachers), default=0)
        plans = [
            cls._of(each, student, teacher, rows_ahead=rows * (1 + prefetch))
            for each in found
            if setting(each, "weight") > 0
        ]
        return max(plans, key=lambda plan: (plan.num_pairs, plan.teacher_layers), default=None)

    @classmethod
    def _of(
        cls, hidden: HiddenSpec, student: ModelShape, teacher: ModelShape, *, rows_ahead: int
    ) -> HiddenPlan:
        spread = min(student.layers, teacher.layers, MAX_PAIRS)
        return cls(
            num_pairs=len(hidden.layers) or spread,
            teacher_layers=len({each.teacher for each in hidden.layers}) or spread,
            teacher_hidden=teacher.hidden,
            normalise=hidden.normalise,
            rows_ahead=rows_ahead,
        )

    def last_pair(self) -> HiddenPlan:
        """The same with one pair of layers."""
        return replace(self, num_pairs=1, teacher_layers=1)

    def projections(self, shape: ModelShape) -> int:
        """Trained weights that take the student's states to the teacher's width."""
        return (
            0 if shape.hidden == self.teacher_hidden else self.num_pairs * shape.hidden * self.teacher_hidden
        )

    def pass_bytes(self, shape: ModelShape, pass_tokens: int, element: int) -> int:
        """Bytes of a forward pass: the teacher's states, and for each pair what the backward pass needs.

        That are the student's picked state, in float32 too where the student computes in `element` bytes of 16 bits, the
        difference, and where there are some the projected and the two normalised states.
        """
        ours = shape.hidden * (element + (FLOAT_BYTES if element < FLOAT_BYTES else 0))
        theirs = self.teacher_hidden * (1 + (shape.hidden != self.teacher_hidden) + 2 * self.normalise)
        pairs = self.num_pairs * (ours + FLOAT_BYTES * theirs)
        return pass_tokens * (FLOAT_BYTES * self.teacher_layers * self.teacher_hidden + pairs)

    def ahead_bytes(self, sequence_tokens: int) -> int:
        """Bytes of main memory of the teacher's states that wait for their step, at most."""
        return self.rows_ahead * sequence_tokens * FLOAT_BYTES * self.teacher_layers * self.teacher_hidden
