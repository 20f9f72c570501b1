"""Pairs of layers of student and teacher whose hidden states are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from stillhouse.protos.errors import FieldViolation
from stillhouse.student_trainer.config.schema import HiddenConfig, LayerPairConfig, LossConfig, RunConfig

MAX_PAIRS = 64


def even_pairs(teacher_layers: int, student_layers: int) -> tuple[LayerPairConfig, ...]:
    """As many pairs as the shallower model has layers, spread evenly over the deeper one; the last with the last."""
    number = min(teacher_layers, student_layers)
    return tuple(
        LayerPairConfig(
            teacher=_nearest(each * teacher_layers, number), student=_nearest(each * student_layers, number)
        )
        for each in range(1, number + 1)
    )


def _nearest(numerator: int, denominator: int) -> int:
    """The nearest integer of a fraction, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def teacher_layers(loss: LossConfig) -> tuple[int, ...]:
    """Layers of the teacher whose states a settled loss compares, ascending."""
    if loss.hidden_mse is None or not loss.compares_hidden:
        return ()
    return tuple(sorted({each.teacher for each in loss.hidden_mse.layers if each.teacher is not None}))


def settle_layers(config: RunConfig, *, teacher_layers: int, student_layers: int) -> RunConfig:
    """The configuration whose losses name the layers that they compare."""

    def settled(loss: LossConfig) -> LossConfig:
        hidden = loss.hidden_mse
        if hidden is None or not loss.compares_hidden or hidden.layers:
            return loss
        return replace(loss, hidden_mse=replace(hidden, layers=even_pairs(teacher_layers, student_layers)))

    contexts = tuple(
        each if each.loss is None else replace(each, loss=settled(each.loss)) for each in config.contexts
    )
    return replace(config, loss=settled(config.loss), contexts=contexts)


def check_pairs(path: str, hidden: HiddenConfig) -> Iterator[FieldViolation]:
    """Problems of the layers of a comparison that no model need be known for."""
    if len(hidden.layers) > MAX_PAIRS:
        yield FieldViolation(f"{path}.layers", f"names {len(hidden.layers)} pairs; the limit is {MAX_PAIRS}.")
    if len(set(hidden.layers)) < len(hidden.layers):
        yield FieldViolation(f"{path}.layers", "names a pair twice; name each once.")


def check_depths(
    path: str, hidden: HiddenConfig, *, teacher_layers: int, student_layers: int
) -> Iterator[FieldViolation]:
    """Pairs whose layers the models do not have."""
    for number, pair in enumerate(hidden.layers):
        for name, layer, most in (
            ("teacher", pair.teacher, teacher_layers),
            ("student", pair.student, student_layers),
        ):
            if layer is not None and layer > most:
                yield FieldViolation(
                    f"{path}.layers[{number}].{name}",
                    f"is {layer}; the {name} has {most} layers, so give a number in [0, {most}].",
                )
