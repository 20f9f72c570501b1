"""Weights of a student on this host, by the headers of its files: a tensor that is lost is refused when a run is created.

Headers tell names without loading torch. What only the architecture tells, the training process compares.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stillhouse.protos.errors import first_line
from stillhouse.protos.files.weight_names import listed, without_wrappers

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
UNIFORM = frozenset(
    {
        *("cohere", "gemma", "gemma2", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "opt"),
        *("phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
    }
)
"""Types of models all of whose layers have weights of the same names."""
MAX_LAYERS = 1024
"""Layers that are looked at: a damaged configuration may name any number."""
_LAYER = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)\.(.+)")
_BUFFERS = re.compile(r"inv_freq$|masked_bias$|\battn\.bias$|attention\.bias$")
"""Buffers that some versions of transformers stored beside the weights."""
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")


class WeightFilesError(ValueError):
    """Weights that are not whole; the text completes the sentence "the directory …", and ends with the remedy."""


def tensor_names(directory: Path) -> list[str]:
    """Returns the names of the tensors in a model's safetensors. Raises WeightFilesError where files or tensors are missing."""
    if (directory / WEIGHTS).is_file():
        return _names_in(directory / WEIGHTS)
    if not (directory / INDEX).is_file():
        raise WeightFilesError(
            f"holds no weights as {WEIGHTS}, or as several files with {INDEX}. Save it again with save_pretrained, which "
            "writes them."
        )
    try:
        places: Mapping[str, str] = dict(json.loads((directory / INDEX).read_bytes())["weight_map"])
        outside = {name for name in places.values() if Path(name).name != name}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightFilesError(f"has an unreadable {INDEX} ({first_line(error)}). Fetch it again.") from error
    if outside:
        raise WeightFilesError(
            f"has an unreadable {INDEX} (it names {listed(outside)}, outside of the directory). Fetch it again."
        )
    files = sorted(set(places.values()))
    absent = [name for name in files if not (directory / name).is_file()]
    if absent:
        raise WeightFilesError(f"lacks {listed(absent)}, which its {INDEX} names. Fetch it again.")
    held = {name for file in files for name in _names_in(directory / file)}
    if lost := places.keys() - held:
        raise WeightFilesError(f"lacks {listed(lost)}, which its {INDEX} names. Save or fetch it again.")
    return list(places)


def check_weights(directory: Path) -> None:
    """Returns unless a weight of the model is known to be lost. Raises WeightFilesError."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return  # the training process says what is wrong
    if not isinstance(config, dict) or (directory / "adapter_config.json").is_file():
        return
    names = [without_wrappers(name) for name in tensor_names(directory)]
    if config.get("model_type") in UNIFORM and not config.get("quantization_config"):
        lost = _lost(names, config)
        if lost:
            raise WeightFilesError(
                f"lacks weights in its files ({listed(lost)}), which would be random numbers. Save or fetch it again."
            )


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, "numpy") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise WeightFilesError(
            f"has an unreadable {path.name} ({first_line(error)}). Fetch it again."
        ) from error


def _lost(names: Collection[str], config: Mapping[str, Any]) -> set[str]:
    """Returns the weights of a model with uniform layers that its other layers, its depth or its settings call for."""
    layers: dict[int, set[str]] = defaultdict(set)
    for name in names:
        found = _LAYER.fullmatch(name)
        if found and not _BUFFERS.search(name):
            layers[int(found[1])].add(found[2])
    depth = next(
        (config[key] for key in ("num_hidden_layers", "n_layer") if isinstance(config.get(key), int)), 0
    )
    wanted = set().union(*layers.values())
    lost = {
        f"layer {number}: {name}"
        for number in range(min(depth, MAX_LAYERS))
        for name in wanted - layers[number]
    }
    if not any(map(_EMBEDDING.search, names)):
        lost.add("the embedding")
    if config.get("tie_word_embeddings") is False and not any(map(_HEAD.search, names)):
        lost.add("the output layer")
    return lost
