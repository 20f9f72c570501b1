"""Types of a checkpoint's weights: integers and 8-bit floats stand for other values unless the configuration says which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from stillhouse.protos.files.weight_names import listed

PLAIN_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Types whose values are those of the weights."""


def unscaled_weights(directory: Path, types: Mapping[str, tuple[str, int]]) -> str:
    """Returns the problem with a model's weights that are stored as codes; empty if there is none.

    `types` are the type, as safetensors names it, and the number of axes of each tensor in the model's files. The text completes
    the sentence "the model …", without a remedy.
    """
    codes = {
        name: kind
        for name, (kind, num_axes) in types.items()
        if kind not in PLAIN_TYPES and num_axes > 1 and name.endswith(".weight")
    }
    if not codes or _names_quantisation(directory):
        return ""
    kinds = ", ".join(sorted(set(codes.values())))
    return (
        f"has weights of type {kinds} ({listed(codes)}) and no quantization_config in its config.json that says what they "
        "stand for"
    )


def _names_quantisation(directory: Path) -> bool:
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    parts = [config, *config.values()] if isinstance(config, dict) else []
    return any(isinstance(each, dict) and each.get("quantization_config") for each in parts)
