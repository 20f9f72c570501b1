"""Presets: the values that other systems use, for fields that a run does not write."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec

PRESETS: Mapping[str, Mapping[str, object]] = {
    # A co-training platform: a LoRA student, soft and hard labels in fixed shares, long epochs.
    "system0": {
        "student": {"lora": {"rank": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}},
        "loss": {
            "temperature": 3.0,
            "hard_weight": 0.3,
            "terms": [{"divergence": "forward_kl", "weight": 0.7}],
        },
        "optimizer": {
            "name": "adamw",
            "lr_scheduler": "cosine",
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "batch_size": 64,  # 16 rows a pass, 4 passes an update
            "epochs": 10,
        },
        "checkpoint": {"every_epochs": 5},
    },
    # A recipe for one student of several adapters, with every weight trained.
    "system4": {
        "student": {"gradient_checkpointing": True},
        "loss": {
            "temperature": 2.0,
            "hard_weight": 0.5,
            "terms": [{"divergence": "forward_kl", "weight": 0.5}],
        },
        "optimizer": {"learning_rate": 5e-5, "batch_size": 16, "epochs": 3},
    },
}
"""Values by preset, with the field names of a run."""


def with_preset(spec: RunSpec) -> RunSpec:
    """`spec` with the values of its preset for the fields that it does not set; a list that it has stays as it is.

    A spec without a preset, or with an unknown one, which the checks refuse, is returned unchanged. `batch_size` of a
    preset yields to `micro_batch_size` and `grad_accum_steps`, which mean the same.
    """
    if spec.preset not in PRESETS:
        return spec
    merged = ParseDict(dict(PRESETS[spec.preset]), RunSpec())
    if spec.optimizer.HasField("micro_batch_size") or spec.optimizer.HasField("grad_accum_steps"):
        merged.optimizer.ClearField("batch_size")
    if spec.optimizer.HasField("max_steps"):
        merged.optimizer.ClearField("epochs")
    if any(getattr(spec.checkpoint, f"every_{unit}") for unit in ("steps", "epochs", "seconds")):
        merged.checkpoint.Clear()
    _yield_lists(merged, spec)
    merged.MergeFrom(spec)
    return merged


def _yield_lists(preset: Message, spec: Message) -> None:
    """Clears each list of `preset` that `spec` has too."""
    for field, value in spec.ListFields():
        if field.is_repeated:
            preset.ClearField(field.name)
        elif field.message_type is not None and preset.HasField(field.name):
            _yield_lists(getattr(preset, field.name), value)
