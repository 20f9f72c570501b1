"""Checks that a teacher gives the hidden states that a run compares, and that they fit into its answers."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_HIDDEN_STATES,
    CAPABILITY_LAYER_STATES,
    GetTeacherInfoResponse,
)
from stillhouse.protos.tensors.distributions import MAX_COLUMNS, MAX_STATES_BYTES
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.teacher.target_requests import gives_last_state


def require_layers(
    info: GetTeacherInfoResponse, target: str, layers: Sequence[int], longest: Example
) -> None:
    """Returns if the teacher gives the states after `layers` layers; empty are not settled yet.

    Raises StillhouseError: CAPABILITY, or SEQUENCE_TOO_LONG for a longest row whose states are too large.
    """
    known = {CAPABILITY_HIDDEN_STATES, CAPABILITY_LAYER_STATES} & set(info.capabilities)
    if not known:
        raise _lacks(info, target, "loss.hidden_mse needs hidden states, which", "or leave hidden_mse out")
    if not info.num_layers:
        raise StillhouseError(
            Reason.CAPABILITY,
            f"loss.hidden_mse needs the number of the teacher's layers, and the teacher at {target} ({info.engine}), of an "
            "earlier version, does not tell it. Start the teacher with this version of Stillhouse, or leave hidden_mse out.",
            metadata={"capability": "CAPABILITY_LAYER_STATES"},
        )
    if not layers:
        return
    if CAPABILITY_LAYER_STATES not in known and not gives_last_state(layers, info):
        last = f"layers: [{{teacher: {info.num_layers}, student: S}}] with the S layers of the student"
        raise _lacks(
            info,
            target,
            f"loss.hidden_mse compares the states after layers {', '.join(map(str, layers))}, of which all but the last",
            f"or compare the last states alone by {last}",
        )
    units = len(layers) * info.hidden_size
    size_bytes = 4 * units * len(longest.token_ids)
    if units > MAX_COLUMNS or size_bytes > MAX_STATES_BYTES:
        raise StillhouseError(
            Reason.SEQUENCE_TOO_LONG,
            f"{longest.place} has {len(longest.token_ids)} tokens, whose states after {len(layers)} layers of {info.hidden_size} "
            f"units take {size_bytes} bytes; {MAX_STATES_BYTES} bytes of a row and {MAX_COLUMNS} units of a token are the limits. "
            "Name fewer pairs in loss.hidden_mse.layers, or lower data.max_sequence_tokens.",
            metadata={"value": str(size_bytes), "limit": str(MAX_STATES_BYTES)},
        )


def _lacks(info: GetTeacherInfoResponse, target: str, what: str, otherwise: str) -> StillhouseError:
    return StillhouseError(
        Reason.CAPABILITY,
        f"{what} the engine of the teacher at {target} ({info.engine}) does not give. Start the teacher with --engine hf, "
        f"{otherwise}.",
        metadata={"capability": "CAPABILITY_LAYER_STATES"},
    )
