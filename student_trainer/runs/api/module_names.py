"""Names of a model's modules, read from the headers of its files without loading it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillhouse.student_trainer.runs.api.weight_files import WeightFilesError, tensor_names

OUTPUT_LAYERS = frozenset({"lm_head", "embed_out", "output"})
"""Modules that may have no weight of their own in the files, because they share the input's."""
MAX_LISTED = 20


def unknown_modules(directory: Path, names: Sequence[str]) -> str | None:
    """Describes those of `names` that are no module of the model in `directory`; None if all are, or that cannot be told.

    It cannot in a mixture of experts: transformers computes it in other modules than its files name.
    """
    modules = _modules(directory)
    if not modules or any(".experts." in each for each in modules):
        return None
    unknown = [
        name
        for name in names
        if name not in OUTPUT_LAYERS
        and not any(each == name or each.endswith(f".{name}") for each in modules)
    ]
    if not unknown:
        return None
    last = sorted({each.rpartition(".")[2] for each in modules})
    return f"{', '.join(unknown)}: no module of this model matches. Its modules are {', '.join(last[:MAX_LISTED])}."


def _modules(directory: Path) -> set[str]:
    try:
        tensors = tensor_names(directory)
    except WeightFilesError:
        return set()  # refused elsewhere, or a model without weights
    return {name.rpartition(".")[0] for name in tensors}
