"""Looks hub ids of models and datasets up when a run is created: in this host's cache, else on the hub; others are refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.protos.errors import FieldViolation, first_line

CONFIG = "config.json"
TIMEOUT_S = 5.0
"""Longest wait for the hub's response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubId:
    """A hub id in a run file."""

    field: str
    name: str
    revision: str = ""
    """Branch, tag or commit; empty for the hub's default."""
    kind: Literal["model", "dataset"] = "model"


def hub_problems(models: Sequence[HubId]) -> list[FieldViolation]:
    """One violation for each of `models` that this host cannot get. Blocks for at most TIMEOUT_S each."""
    found = [(each.field, problem) for each in models if (problem := _problem(each))]
    return [FieldViolation(field, description) for field, description in found]


def _problem(asked: HubId) -> str | None:
    # Imported here: most runs name directories, and the service starts without it.
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision, kind = asked.name, asked.revision or None, asked.kind
    place, things = ("directory", "models") if kind == "model" else ("path", "datasets")
    try:
        if _is_cached(asked):
            return None
    except (ValueError, OSError) as error:
        return f'"{name}" is neither a {place} on the trainer\'s host nor a Hugging Face id ({first_line(error)}); correct it.'
    neither = (
        f'"{name}" is neither a {place} on the trainer\'s host nor in its cache of Hugging Face {things}'
    )
    if constants.HF_HUB_OFFLINE:
        return f"{neither}, and HF_HUB_OFFLINE keeps it from looking further; give a {place}, or download the {kind} there."
    try:
        info = HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=TIMEOUT_S)
    except GatedRepoError:
        return f'"{name}" is gated on Hugging Face; accept its terms, and give the trainer an HF_TOKEN that may read it.'
    except RepositoryNotFoundError:
        return (
            f'"{name}" is neither a {place} on the trainer\'s host nor a {kind} that Hugging Face shows it; correct the '
            f"path or the id, or give the trainer an HF_TOKEN if the {kind} is private."
        )
    except RevisionNotFoundError:
        return f'"{name}" has no revision "{asked.revision}" on Hugging Face; name a branch, a tag or a commit of it.'
    except Exception as error:  # of its HTTP library, which differs by version
        why = first_line(error).rstrip(".") or type(error).__name__
        return f"{neither}, and Hugging Face cannot be reached from there ({why}); give a {place}, or download the {kind} there."
    files = {each.rfilename for each in getattr(info, "siblings", None) or ()}
    if kind == "model" and files and CONFIG not in files:
        return f'"{name}" on Hugging Face holds no {CONFIG}; name a model in the layout of transformers.'
    return None


def _is_cached(asked: HubId) -> bool:
    """True if this host has the repository. Raises ValueError for a name that the hub cannot have."""
    from huggingface_hub import constants, try_to_load_from_cache

    if asked.kind == "model":
        return isinstance(try_to_load_from_cache(asked.name, CONFIG, revision=asked.revision or None), str)
    # The library datasets, which takes seconds to import, prepares them in folders of these names.
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    wanted = _folded(asked.name.replace("/", "___"))
    return prepared.is_dir() and any(_folded(each.name) == wanted for each in prepared.iterdir())


def _folded(name: str) -> str:
    """The name of a folder without what differs between a repository's name and that of its folder."""
    return name.replace("_", "").lower()
