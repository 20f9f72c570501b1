"""Writes students in Hugging Face layout: complete models, and adapters with their base where nothing else holds it.

Settings that transformers loads but refuses to save, such as a temperature without do_sample, are written as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.protos.files.adapter import BASE, name_base
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.config.schema import StudentConfig

GENERATION_CONFIG = "generation_config.json"
_CARD = """---
library_name: peft
pipeline_tag: text-generation
tags:
- lora
---

# LoRA adapter

Its base is the model in `base/`: {origin}. No other model fits it.

{loading}"""
LOADING = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("DIR/base"), "DIR")
```

`DIR` is this directory. `AutoPeftModelForCausalLM.from_pretrained("DIR")` does the same while `base_model_name_or_path` in
`adapter_config.json` is the absolute path of `base/`: it is where the directory was written, or copied to by `stillhouse run pull`.
"""
"""The way to load an adapter whose base lies beside it."""


def save_model(model: Any, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes weights, configuration and generation settings of a complete model; `state` replaces its own weights."""
    settings = model.generation_config if model.can_generate() else None
    with _savable_settings(model):
        model.save_pretrained(directory, state_dict=None if state is None else dict(state))
    if settings is not None:
        # Not its own save_pretrained, which refuses what its from_pretrained takes.
        settings.to_json_file(directory / GENERATION_CONFIG, use_diff=True, keys_to_pop=["compile_config"])


def save_adapter(
    model: Any, config: StudentConfig, directory: Path, tokenizer: Any, place: Path | None = None
) -> None:
    """Writes the adapter of a PEFT model, and its base with the tokenizer under base/ if `config.model` does not hold that.

    `place` is where `directory` will be once it is complete. PEFT takes the base's path from the adapter's configuration
    and looks a relative one up in the working directory, or on the hub; so it is absolute.
    """
    model.save_pretrained(directory, save_embedding_layers=False)
    if not (config.keep_layers or config.from_config):
        return
    save_model(model.get_base_model(), directory / BASE, base_state(model))
    tokenizer.save_pretrained(directory / BASE)
    name_base(directory, place or directory)
    (directory / "README.md").write_text(_card(config))


def _card(config: StudentConfig) -> str:
    """Returns the model card of an adapter with its base beside it; PEFT's own names the model that the base was made of."""
    if config.from_config:
        origin = f"a model with the configuration of `{config.model}` that began as random numbers"
    else:
        layers = ", ".join(map(str, config.keep_layers))
        origin = f"layers {layers} of `{config.model}`, counted from 0, with its embeddings and output layer"
    return _CARD.format(origin=origin, loading=LOADING)


def unchanged_names(model: Any) -> set[str]:
    """Returns the names of weights that `save_model` stores under the same name with the same values.

    Some architectures are computed in other tensors than those of their files. Raises ValueError if these cannot be
    told from each other or made again.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = remove_tied_weights_from_state_dict(dict(model_state(model)), _plain(model))
    shapes = {name: torch.empty_like(each, device="meta") for name, each in state.items()}
    written = revert_weight_conversion(_plain(model), dict(shapes))
    return {name for name, each in shapes.items() if written.get(name) is each}


def model_state(model: Any) -> Mapping[str, Tensor]:
    """Returns the weights of a complete model by name, without those of an adapter on it."""
    return base_state(model) if hasattr(model, "get_base_model") else model.state_dict()


def base_state(model: Any) -> dict[str, Tensor]:
    """Returns the weights of a PEFT model's base by the names that they have without the adapter."""
    added = (".lora_", ".modules_to_save.", ".token_adapter.")
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): each
        for name, each in model.get_base_model().state_dict().items()
        if not any(part in name for part in added)
    }


def try_saving(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes all but the weights to `directory` and reads it back. Raises whatever fails; ValueError if it differs."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    plain = _plain(model)
    if getattr(plain, "hf_quantizer", None) is None:
        unchanged_names(model)
    with _savable_settings(plain):
        plain.config.save_pretrained(directory)
    AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if plain.can_generate():
        plain.generation_config.to_json_file(
            directory / GENERATION_CONFIG, use_diff=True, keys_to_pop=["compile_config"]
        )
        GenerationConfig.from_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if _fingerprint(AutoTokenizer.from_pretrained(directory, trust_remote_code=False)) != _fingerprint(
        tokenizer
    ):
        raise ValueError("its tokenizer becomes another one by being saved")


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _fingerprint(tokenizer: Any) -> str:
    return tokenizer_fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)


@contextmanager
def _savable_settings(model: Any) -> Iterator[None]:
    """Takes settings away, inside the block, that only save_pretrained refuses."""
    from transformers import GenerationConfig

    if not model.can_generate():  # a classifier has none
        yield
        return
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
