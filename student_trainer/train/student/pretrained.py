"""Loads a pretrained language model whole: each of its weights is in its files, or tied to one that is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import structlog
import torch

from stillhouse.protos.files.weight_names import listed, wrapper_patterns

log = structlog.get_logger()

MAX_LOOKAHEAD = {torch.float32: 1e-5}
"""Largest influence of a later token on logits that rounding explains, as a share of their spread, by numeric type."""
HALF_LOOKAHEAD = 1e-2


class UnfitModelError(ValueError):
    """A model that its files do not describe as a language model; the text completes the sentence "the model …"."""


def load_pretrained(source: str, **options: Any) -> Any:
    """Loads a causal language model from the directory or hub id `source`.

    A prefix that a wrapper such as torch.compile left on every name is taken off, and the log says so. Raises
    UnfitModelError for weights that would be random, and whatever transformers raises.
    """
    from transformers import AutoModelForCausalLM

    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True, **options}
    model, found = AutoModelForCausalLM.from_pretrained(source, **options)
    missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
    tied = getattr(model, "all_tied_weights_keys", {}).keys()
    renamed = wrapper_patterns(missing - tied, unexpected, model.base_model_prefix)
    if renamed:
        del model
        model, found = AutoModelForCausalLM.from_pretrained(source, key_mapping=renamed, **options)
        # Else saving would put the prefix on again.
        model._weight_conversions = [
            each
            for each in getattr(model, "_weight_conversions", None) or []
            if not renamed.keys() & set(each._original_source_patterns)
        ]
        missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
        log.warning("names of weights repaired", model=source, removed=" and ".join(renamed))
    if missing:
        raise UnfitModelError(_missing_sentence(model, missing, unexpected))
    unmerged = [name for name in unexpected if ".lora_" in name]
    if unmerged:
        raise UnfitModelError(
            f"holds an adapter that is not merged ({listed(unmerged)}), which would be left out; merge it"
        )
    if unexpected:
        log.warning(
            "the model's files hold weights that it does not use",
            model=source,
            count=len(unexpected),
            such_as=listed(unexpected),
        )
    return model


def check_causal(model: Any) -> None:
    """Returns if no logits of `model`, which is in evaluation mode, depend on a later token; else raises UnfitModelError."""
    weight = model.get_input_embeddings().weight
    one = torch.arange(8, device=weight.device) * 7 % weight.shape[0]
    other = one.clone()
    other[-1] = (other[-1] + 1) % weight.shape[0]
    logits = model(input_ids=torch.stack([one, other]), use_cache=False).logits.float()
    before, spread = logits[:, :-1], logits.std()
    if (before[0] - before[1]).abs().max() > MAX_LOOKAHEAD.get(weight.dtype, HALF_LOOKAHEAD) * spread:
        raise UnfitModelError(
            "computes its logits from later tokens too, as an encoder such as BERT does, so it cannot be trained or "
            "sampled as a language model"
        )


def _missing_sentence(model: Any, missing: Collection[str], unexpected: Collection[str]) -> str:
    count = f"{len(missing)} weights" if len(missing) > 1 else "one weight"
    others = f", which hold {listed(unexpected)} instead" if unexpected else ""
    return f"lacks {count} of a {type(model).__name__} in its files ({listed(missing)}){others}; they would be random numbers"
