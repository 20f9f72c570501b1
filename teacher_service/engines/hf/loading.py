"""Reads a causal language model with transformers: every weight comes from the checkpoint, and every position from those
before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.weight_names import listed
from stillhouse.teacher_service.models.finite_weights import non_finite_logits
from stillhouse.teacher_service.models.weight_names import check_weight_names

_PROBE_TOKENS = 8
_TOLERANCE = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-3, 1e-5)}
_HALF_TOLERANCE = (0.1, 0.03)
"""Shares of the logits' spread, by type: the most by which equal passes of other shapes differ, and what never matters."""


def load_causal_lm(directory: Path, model: str, **options: Any) -> Any:
    """Loads the model in `directory`; `options` go to transformers' `from_pretrained`. Code of a model is never run.

    Raises `StillhouseError` (MODEL_NOT_FOUND) for weights that the files lack, and whatever transformers raises.
    """
    import transformers
    from safetensors.torch import load_file

    names = check_weight_names(directory, model)
    if not names.renamed:
        loaded, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name
            **options,
        )
        _require_whole(model, found)
        return loaded
    config = transformers.AutoConfig.from_pretrained(
        directory, trust_remote_code=False, local_files_only=True
    )
    cls = type(_empty(config))
    weights = {names.renamed[key]: tensor for path in names.files for key, tensor in load_file(path).items()}
    if options.get("dtype") == "auto":
        options["dtype"] = config.dtype or next(iter(weights.values())).dtype
    return cls.from_pretrained(None, config=config, state_dict=weights, **options)


def _require_whole(model: str, found: Mapping[str, Any]) -> None:
    """Raises `StillhouseError` (MODEL_NOT_FOUND) for tensors of other shapes, and for lost ones, such as scales of quantised
    weights, that the names alone do not tell."""
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        name, held, wanted = mismatched[0]
        more = f", and {len(mismatched) - 1} more do not fit" if len(mismatched) > 1 else ""
        raise StillhouseError(
            Reason.MODEL_NOT_FOUND,
            f"{model} holds {name} as {list(held)}, and its config.json makes it {list(wanted)}{more}. Give the configuration "
            "that belongs to the weights.",
        )
    if found["missing_keys"]:
        raise StillhouseError(
            Reason.MODEL_NOT_FOUND,
            f"{model} lacks {listed(found['missing_keys'])} in its files, which would be random numbers. Save or fetch it again.",
        )


def require_causal(model: Any, name: str) -> None:
    """Raises `StillhouseError` (MODEL_NOT_FOUND) for a model, such as an encoder, whose logits at a position depend on
    later tokens, and for one whose logits are not finite."""
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, _PROBE_TOKENS), generator=generator).to(model.device)
    half = _PROBE_TOKENS // 2
    others = ids.clone()
    others[:, half:] = (ids[:, half:] + 1) % vocab_size
    with torch.inference_mode():
        one, other = model(torch.cat([ids, others])).logits[:, :half]
    if not torch.isfinite(one).all():
        broken = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
        raise non_finite_logits(name, str(model.dtype).removeprefix("torch."), next(iter(broken), ""))
    if not agree(other, one, model.dtype):
        raise StillhouseError(
            Reason.MODEL_NOT_FOUND,
            f"{name} is read as {type(model).__name__}, whose logits depend on later tokens: it is an encoder, not a language "
            "model. Give a model that was trained to continue text.",
        )


def agree(found: Tensor, wanted: Tensor, dtype: torch.dtype, *, without: Tensor | None = None) -> bool:
    """True if logits differ by no more than rounding does in `dtype`, measured by their spread over the vocabulary.

    `without` are logits without what is tried, such as a memory: a tenth of its effect is no rounding either.
    """
    most, least = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    found, exact = found.double(), wanted.double()
    spread = float(exact.std(dim=-1).mean())
    limit = most * spread
    if without is not None:
        limit = min(limit, max(0.1 * _error(without.double(), exact), least * spread))
    return _error(found, exact) <= limit


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().mean().sqrt())


def _empty(config: Any) -> Any:
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)
