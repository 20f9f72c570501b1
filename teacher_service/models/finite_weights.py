"""The refusal of a model that computes NaN or infinite logits, with the name of a weight that holds such values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stillhouse.protos.errors import Reason, StillhouseError


def non_finite_logits(model: str, dtype: str, broken: str) -> StillhouseError:
    """Builds the error (MODEL_NOT_FOUND); `broken` is the name of such a weight, empty if all weights are finite."""
    why = f"{broken} holds such values; fetch the model again" if broken else "choose another --dtype"
    return StillhouseError(
        Reason.MODEL_NOT_FOUND, f"{model} computes NaN or infinite logits in {dtype}: {why}."
    )


def broken_weight(files: Iterable[Path]) -> str:
    """Returns the name of the first tensor in these safetensors with a NaN or infinite value; empty if there is none."""
    import torch
    from safetensors import safe_open

    for path in files:
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - it is no mapping
                tensor = weights.get_tensor(key)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                    return str(key)
    return ""
