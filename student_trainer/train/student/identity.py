"""The parts of a student that its checkpoints take from elsewhere: settings of its computation, and weights that are not trained.

A resumed run that met others would go on with another model in silence.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from stillhouse.student_trainer.config.checks import invalid_field

STUDENT_FACT = "student_identity"
"""Name of the fact in a checkpoint's manifest."""
_FROZEN = "frozen weights"
_SAMPLED = 64
"""Values of each weight that are compared: another training changes nearly all."""
_NO_COMPUTATION = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"),
        *("use_cache", "quantization_config", "id2label", "label2id", "problem_type"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "output_hidden_states", "output_attentions"),
        *("return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder"),
    }
)
"""Settings that change no logits, or that the run decides on."""


def identity_of(plain: Any, model: nn.Module) -> str:
    """Returns the identity of a student as JSON; `plain` is the model without its adapter."""
    settings = {
        name: value
        for name, value in plain.config.to_dict().items()
        if name not in _NO_COMPUTATION and not name.startswith("_")
    }
    return json.dumps({"settings": settings, _FROZEN: _frozen(model)}, default=str, sort_keys=True)


def check_same_student(kept: str | None, found: str, model: str) -> None:
    """Returns if the student is the one of the checkpoint, or that does not tell; settings that one of them lacks are not
    compared. Raises StillhouseError(INVALID_SPEC)."""
    if kept is None:
        return
    former, present = json.loads(kept), json.loads(found)
    for name, value in former["settings"].items():
        now = present["settings"].get(name, value)
        if now != value:
            raise _changed(model, f"the {name} of its config.json is {now!r:.80}, and was {value!r:.80}")
    if former[_FROZEN] != present[_FROZEN]:
        raise _changed(model, "its weights, on which the adapter is trained, are others")


def _changed(model: str, what: str) -> Exception:
    return invalid_field(
        "student.model",
        f"{model} is not the model that this run began with: {what}. Put the former files back, or create a new run.",
    )


def _frozen(model: nn.Module) -> str:
    """Returns a digest of some values of each weight that is not trained; empty if there is none.

    They are rounded to bfloat16, in which another device may hold them; quantised weights are left out for the same reason.
    """
    digest, count = hashlib.sha256(), 0
    for name, weight in model.named_parameters():
        if weight.requires_grad or not weight.is_floating_point():
            continue
        values = weight.detach().flatten()
        some = values[:: max(1, len(values) // _SAMPLED)][:_SAMPLED].to(torch.bfloat16).float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
        count += 1
    return digest.hexdigest() if count else ""
