"""Looks hub ids up when a run is created: in this host's cache, else on the hub; an id that neither has is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.protos.errors import FieldViolation, first_line

CONFIG = "config.json"
TIMEOUT_S = 5.0
"""Longest wait for the hub's response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubModel:
    """A hub id in a run file."""

    field: str
    name: str
    revision: str
    """Branch, tag or commit; empty for the hub's default."""


def hub_problems(models: Sequence[HubModel]) -> list[FieldViolation]:
    """One violation for each of `models` that this host cannot get. Blocks for at most TIMEOUT_S each."""
    found = [(each.field, problem) for each in models if (problem := _problem(each))]
    return [FieldViolation(field, description) for field, description in found]


def _problem(model: HubModel) -> str | None:
    # Imported here: most runs name directories, and the service starts without it.
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = model.name, model.revision or None
    try:
        is_cached = isinstance(try_to_load_from_cache(name, CONFIG, revision=revision), str)
    except (ValueError, OSError) as error:
        return f'"{name}" is neither a directory on the trainer\'s host nor a Hugging Face id ({first_line(error)}); correct it.'
    if is_cached:
        return None
    neither = (
        f'"{name}" is neither a directory on the trainer\'s host nor in its cache of Hugging Face models'
    )
    if constants.HF_HUB_OFFLINE:
        return f"{neither}, and HF_HUB_OFFLINE keeps it from looking further; give a directory, or download the model there."
    try:
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)
    except GatedRepoError:
        return f'"{name}" is gated on Hugging Face; accept its terms, and give the trainer an HF_TOKEN that may read it.'
    except RepositoryNotFoundError:
        return (
            f'"{name}" is neither a directory on the trainer\'s host nor a model that Hugging Face shows it; correct the '
            "path or the id, or give the trainer an HF_TOKEN if the model is private."
        )
    except RevisionNotFoundError:
        return f'"{name}" has no revision "{model.revision}" on Hugging Face; name a branch, a tag or a commit of it.'
    except Exception as error:  # of its HTTP library, which differs by version
        why = first_line(error).rstrip(".") or type(error).__name__
        return f"{neither}, and Hugging Face cannot be reached from there ({why}); give a directory, or download the model there."
    files = {each.rfilename for each in info.siblings or ()}
    if files and CONFIG not in files:
        return f'"{name}" on Hugging Face holds no {CONFIG}; name a model in the layout of transformers.'
    return None
