"""Limits of a model's services: the least of each counts for all, and each must take the ids that a run queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoResponse
from stillhouse.student_trainer.config.rules.loss import STUDENT_TAIL
from stillhouse.student_trainer.config.schema import RunConfig

_LIMITS = ("max_sequence_tokens", "max_top_k", "max_query_tokens", "max_prompts", "max_inflight_sequences")


@dataclass(frozen=True, kw_only=True, slots=True)
class QueriedDraws:
    """Ids of a position that a loss on the student's own texts queries."""

    field: str
    """Place in the run file of the number of draws."""
    top_k: int
    num_draws: int


def queried_draws(config: RunConfig) -> tuple[QueriedDraws, ...]:
    """The queries of each loss whose targets the student draws."""
    found = []
    for number, context in enumerate(config.contexts):
        loss = config.loss_of(context)
        if context.student is not None and loss.sparse_target == STUDENT_TAIL and loss.asks_teacher:
            path = f"contexts[{number}].loss" if context.loss else "loss"
            found.append(
                QueriedDraws(
                    field=f"{path}.num_samples", top_k=loss.least_top_k, num_draws=loss.num_samples or 0
                )
            )
    return tuple(found)


def check_queried_draws(every: Sequence[QueriedDraws], info: GetTeacherInfoResponse, target: str) -> None:
    """Returns if a service may be queried for all draws of a position. Raises StillhouseError(INVALID_SPEC)."""
    for asked in every:
        limit = info.max_query_tokens
        top_k = min(asked.top_k, limit)
        if asked.num_draws and top_k + asked.num_draws > limit:
            raise StillhouseError(
                Reason.INVALID_SPEC,
                f"{asked.field} is {asked.num_draws}: with {top_k} likeliest tokens of the student that is more ids a position "
                f"than the {limit} that the teacher at {target} may be queried for. Set it to at most {limit - top_k}, leave it "
                "out with sparse_target, or start the teacher with a larger --max-query-tokens.",
                metadata={"value": str(asked.num_draws), "limit": str(limit - top_k)},
            )


def common(infos: Sequence[GetTeacherInfoResponse]) -> GetTeacherInfoResponse:
    """Merges the information of a model's services: the least of each limit, and the capabilities of all."""
    merged = GetTeacherInfoResponse()
    merged.CopyFrom(infos[0])
    for name in _LIMITS:
        setattr(merged, name, min(getattr(info, name) for info in infos))
    every = set(merged.capabilities).intersection(*(info.capabilities for info in infos))
    merged.ClearField("capabilities")
    merged.capabilities.extend(sorted(every))
    return merged
