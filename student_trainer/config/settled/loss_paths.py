"""Losses of a run and of its contexts by their paths in the run file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from stillhouse.protos.stillhouse.v1.run_pb2 import LossSpec, RunSpec
from stillhouse.student_trainer.config.schema import LossConfig, RunConfig


def with_losses(config: RunConfig, change: Callable[[str, LossConfig], LossConfig]) -> RunConfig:
    """`config` with each loss as `change` returns it for a path and a loss."""
    contexts = tuple(
        context if context.loss is None else replace(context, loss=change(_path(number), context.loss))
        for number, context in enumerate(config.contexts)
    )
    return replace(config, loss=change("loss", config.loss), contexts=contexts)


def loss_specs(spec: RunSpec) -> Sequence[tuple[str, LossSpec]]:
    """The losses of a spec, which a caller may change in place, with their paths."""
    own = [
        (_path(number), context.loss)
        for number, context in enumerate(spec.contexts)
        if context.HasField("loss")
    ]
    return [("loss", spec.loss), *own]


def _path(context: int) -> str:
    return f"contexts[{context}].loss"
