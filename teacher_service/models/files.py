"""Model files on this host: a directory as given, or a hub model fetched without its code."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stillhouse.protos.errors import Reason, StillhouseError, first_line

# Configuration, tokenizer and weights; neither Python files nor duplicates in other frameworks' formats.
_WEIGHTS = "*.safetensors"
_PATTERNS = ("*.json", _WEIGHTS, "*.model", "*.txt", "*.jinja", "*.tiktoken")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """A model on this host."""

    directory: Path
    """Directory in Hugging Face layout."""
    revision: str
    """Commit on the hub; empty for a local directory."""


def locate_model(model: str, revision: str = "", *, weights: bool = True) -> ModelFiles:
    """Locates a directory or hub id, downloading what the cache lacks, its weights only if they are needed.

    Raises `StillhouseError` (MODEL_NOT_FOUND) when neither has it.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelFiles(directory=path.resolve(), revision="")
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(
            snapshot_download(
                model,
                revision=revision or None,
                allow_patterns=[each for each in _PATTERNS if weights or each != _WEIGHTS],
            )
        )
    except (OSError, ValueError) as error:
        raise StillhouseError(
            Reason.MODEL_NOT_FOUND,
            f"There is no directory {model}, and the hub does not give {model}"
            f"{f' at {revision}' if revision else ''}: {first_line(error)} "
            "Give --model the directory of a model, or a hub id that this host can reach or has in its cache.",
        ) from error
    return ModelFiles(directory=snapshot, revision=snapshot.name)


def is_quantised(directory: Path) -> bool:
    """True if a checkpoint declares quantised weights."""
    with suppress(OSError, ValueError, AttributeError):
        return bool(json.loads((directory / "config.json").read_bytes()).get("quantization_config"))
    return False


def is_classifier(directory: Path) -> bool:
    """True if the configuration of a model names a sequence classifier."""
    with suppress(OSError, ValueError, AttributeError, LookupError, TypeError):
        named = json.loads((directory / "config.json").read_bytes())["architectures"][0]
        return str(named).endswith("ForSequenceClassification")
    return False
