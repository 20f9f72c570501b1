"""Pairs of layers of student and teacher whose hidden states are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.protos.errors import FieldViolation
from stillhouse.protos.stillhouse.v1.run_pb2 import LayerPair, RunSpec
from stillhouse.student_trainer.config.rules.contexts import run_losses
from stillhouse.student_trainer.config.schema import HiddenConfig, LayerPairConfig, LossConfig, RunConfig
from stillhouse.student_trainer.config.settled.loss_paths import loss_specs, with_losses

MAX_PAIRS = 64
EVEN, LAST = "even", "last"
"""Rules by which the pairs of a loss that names none are found. LAST is that of checkpoints from before layers were chosen."""


def even_pairs(teacher_layers: int, student_layers: int) -> tuple[LayerPairConfig, ...]:
    """As many pairs as the shallower model has layers, at most MAX_PAIRS, spread evenly over both; the last with the last."""
    number = min(teacher_layers, student_layers, MAX_PAIRS)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChoice:
    """The settled layers of one loss whose run file names none."""

    layers: tuple[LayerPairConfig, ...]
    layers_reason: str

    @classmethod
    def by(cls, rule: str, *, teacher_layers: int, student_layers: int) -> LayerChoice:
        """The pairs by `rule`, EVEN or LAST, of models with so many layers."""
        if rule == LAST:
            pairs: tuple[LayerPairConfig, ...] = (
                LayerPairConfig(teacher=teacher_layers, student=student_layers),
            )
            why = (
                "the last layers alone, as in the checkpoint of an earlier version that the run resumed from"
            )
        else:
            pairs = even_pairs(teacher_layers, student_layers)
            why = f"spread evenly over {teacher_layers} layers of the teacher and {student_layers} of the student"
        return cls(layers=pairs, layers_reason=why)

    def to_json(self) -> dict[str, Any]:
        """Its fields by their names in the run file."""
        pairs = [{"teacher": each.teacher, "student": each.student} for each in self.layers]
        return {"layers": pairs, "layers_reason": self.layers_reason}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerChoice:
        """The choice that `to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        pairs = tuple(
            LayerPairConfig(teacher=int(each["teacher"]), student=int(each["student"]))
            for each in value["layers"]
        )
        return cls(layers=pairs, layers_reason=str(value["layers_reason"]))


def unsettled_layers(config: RunConfig) -> Iterator[str]:
    """Paths of the losses that compare layers which no file names."""
    for path, loss in run_losses(config):
        if loss.hidden_mse is not None and loss.compares_hidden and not loss.hidden_mse.layers:
            yield path


def settle_layers(config: RunConfig, choices: Mapping[str, LayerChoice]) -> RunConfig:
    """`config` with the losses at the paths of `choices` settled."""

    def settled(path: str, loss: LossConfig) -> LossConfig:
        if path not in choices or loss.hidden_mse is None:
            return loss
        choice = choices[path]
        hidden = replace(loss.hidden_mse, layers=choice.layers, layers_reason=choice.layers_reason)
        return replace(loss, hidden_mse=hidden)

    return with_losses(config, settled)


def settle_spec_layers(spec: RunSpec, choices: Mapping[str, LayerChoice]) -> None:
    """Does the same to an effective spec, in place."""
    for path, loss in loss_specs(spec):
        if path in choices and loss.HasField("hidden_mse"):
            pairs = (LayerPair(teacher=each.teacher, student=each.student) for each in choices[path].layers)
            loss.hidden_mse.ClearField("layers")
            loss.hidden_mse.layers.extend(pairs)
            loss.hidden_mse.layers_reason = choices[path].layers_reason


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
