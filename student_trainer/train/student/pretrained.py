"""Loads a pretrained language model whole: each of its weights is in its files, or tied to one that is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import structlog
import torch

from stillhouse.protos.files.weight_names import listed, wrapper_patterns
from stillhouse.student_trainer.train.student.checkpoint_files import (
    lost_biases,
    misread_weights,
    weight_files,
)

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

    options = {
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused by name
        **options,
    }
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
    if found["mismatched_keys"]:
        raise UnfitModelError(_mismatch_sentence(found["mismatched_keys"]))
    if missing:
        raise UnfitModelError(_missing_sentence(model, missing, unexpected))
    unmerged = [name for name in unexpected if ".lora_" in name]
    if unmerged:
        raise UnfitModelError(
            f"holds an adapter that is not merged ({listed(unmerged)}), which would be left out; merge it"
        )
    files = weight_files(source, options.get("revision"))
    if problem := misread_weights(files):
        raise UnfitModelError(problem)
    if lost := lost_biases(model, unexpected, files):
        raise UnfitModelError(
            f"has {listed(lost)} in its files, and its configuration makes a model without; set what makes the bias in "
            "config.json, such as attention_bias or mlp_bias"
        )
    _keep_untied(model, source)
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


def _keep_untied(model: Any, source: str) -> None:
    """Corrects the configuration of a model whose files untie ends that it ties: transformers computes with the files, and
    engines that read the export go by the configuration."""
    output, own = model.get_output_embeddings(), model.get_input_embeddings()
    settings = [each for each in (model.config, model.config.get_text_config()) if each.tie_word_embeddings]
    if (
        not settings
        or output is None
        or output.weight is own.weight
        or torch.equal(output.weight, own.weight)
    ):
        return
    for each in settings:
        each.tie_word_embeddings = False
    log.warning(
        "the output layer has values of its own, though tie_word_embeddings is true: it is trained and exported untied",
        model=source,
    )


def _mismatch_sentence(mismatched: Collection[tuple[str, Any, Any]]) -> str:
    name, held, wanted = min(mismatched, key=lambda each: each[0])
    more = f", and {len(mismatched) - 1} more do not fit" if len(mismatched) > 1 else ""
    return f"holds {name} as {list(held)}, and its configuration makes it {list(wanted)}{more}"


def _missing_sentence(model: Any, missing: Collection[str], unexpected: Collection[str]) -> str:
    count = f"{len(missing)} weights" if len(missing) > 1 else "one weight"
    others = f", which hold {listed(unexpected)} instead" if unexpected else ""
    return f"lacks {count} of a {type(model).__name__} in its files ({listed(missing)}){others}; they would be random numbers"
