"""A pretrained model's safetensors: their types, and the values of what the model left unread."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from stillhouse.protos.files.model_settings import GENERATION_SETTINGS, wrong_settings
from stillhouse.protos.files.weight_types import plain_weights, unscaled_weights

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(source: str, revision: str | None) -> list[Path]:
    """Returns the safetensors of a directory or hub id that has been loaded; none if they have other names."""
    single = _find(source, revision, _SINGLE)
    if single is not None:
        return [single]
    index = _find(source, revision, _INDEX)
    if index is None:
        return []
    names = set(json.loads(index.read_bytes())["weight_map"].values())
    return [index.parent / name for name in sorted(names)]


def wrong_generation_settings(source: str, revision: str | None) -> str:
    """Returns the problem with the generation settings of a directory or hub id that was read, as the end of a sentence."""
    path = _find(source, revision, GENERATION_SETTINGS)
    return "" if path is None else wrong_settings(path)


def _find(source: str, revision: str | None, name: str) -> Path | None:
    from transformers.utils.hub import cached_file

    found = cached_file(
        source, name, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else Path(found)


def misread_weights(files: Collection[Path]) -> str:
    """Returns the problem with weights that are stored as codes and not declared so, or the other way about, as the end of a
    sentence; empty if there is none."""
    from safetensors import safe_open

    types = {}
    for path in files:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                view = tensors.get_slice(name)
                types[name] = str(view.get_dtype()), len(view.get_shape())
    if not files:
        return ""
    directory = next(iter(files)).parent
    return unscaled_weights(directory, types) or plain_weights(directory, types)


def lost_biases(model: Any, unread: Collection[str], files: Collection[Path]) -> list[str]:
    """Returns the biases, other than zero, in the files of a model whose configuration makes their modules without."""
    wanted = set()
    for name in unread:
        place, _, parameter = name.rpartition(".")
        try:
            module = model.get_submodule(place)
        except AttributeError:
            continue
        if parameter == "bias" and module._parameters.get("bias", 0) is None:
            wanted.add(name)
    return sorted(name for name, tensor in _tensors(files, wanted) if bool(tensor.any()))


def _tensors(files: Collection[Path], wanted: set[str]) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for path in files if wanted else ():
        with safe_open(path, "pt") as tensors:
            for name in wanted.intersection(tensors.keys()):
                yield name, tensors.get_tensor(name)
