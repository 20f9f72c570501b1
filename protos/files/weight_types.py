"""Types of a checkpoint's weights: integers and 8-bit floats stand for other values unless the configuration says which."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from stillhouse.protos.files.weight_names import listed

PLAIN_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Types whose values are those of the weights."""
_SCALES = (".absmax", ".SCB")
"""Ends of the names of bitsandbytes' scales, in 4 and in 8 bits."""


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


def plain_weights(directory: Path, names: Collection[str]) -> str:
    """Returns the problem with a model whose configuration says that bitsandbytes has quantised it, and whose tensors are plain.

    Empty if there is none; `names` are those of its tensors. The text completes the sentence "the model …".
    """
    methods = {each.get("quant_method") for each in _quantisations(directory) if isinstance(each, dict)}
    if "bitsandbytes" not in methods or any(name.endswith(_SCALES) for name in names):
        return ""
    return (
        'has a quantization_config of "bitsandbytes" in its config.json, and its files hold plain weights; take quantization_config '
        "out of config.json"
    )


def _names_quantisation(directory: Path) -> bool:
    return any(_quantisations(directory))


def _quantisations(directory: Path) -> list[Any]:
    """Every quantization_config of a model's configuration and of its parts."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return []
    parts = [config, *config.values()] if isinstance(config, dict) else []
    return [each.get("quantization_config") for each in parts if isinstance(each, dict)]
