"""Loads the student's model: whole or a subset of its layers, optionally quantised, and with a LoRA adapter if one is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.train.data.readers import resolve
from stillhouse.student_trainer.train.student.adapters import add_adapter, load_adapter, merge
from stillhouse.student_trainer.train.student.checkpoint_files import wrong_generation_settings
from stillhouse.student_trainer.train.student.pretrained import UnfitModelError, load_pretrained


def load_model(config: StudentConfig, data_dir: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads the base with the kept layers and, if one is trained, the adapter, on `device`.

    Raises StillhouseError: MODEL_NOT_FOUND, INVALID_SPEC, CAPABILITY.
    """
    is_quantized = config.quantization != "none"
    base = (
        _load_quantized(config, data_dir, dtype, device)
        if is_quantized
        else load_base(config, data_dir, dtype)
    )
    model = keep_layers(base, config)
    if is_quantized:
        import peft

        # Casts norms to float32 and, for gradient checkpointing, enables gradients at the input.
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=config.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    if config.adapter:
        model = load_adapter(model, config, data_dir)
    elif config.lora:
        model = add_adapter(model, config.lora)
    return model if is_quantized else model.to(device)


def load_base(
    config: StudentConfig, data_dir: Path, dtype: torch.dtype, quantization: Any = None, **where: Any
) -> Any:
    """Loads the base with all its layers. Raises StillhouseError(MODEL_NOT_FOUND)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = model_source(config, data_dir)
    common: dict[str, Any] = {"revision": config.revision or None, "trust_remote_code": False}
    try:
        if config.from_config:
            settings = AutoConfig.from_pretrained(source, **common)
            model = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=False)
        else:
            if quantization is not None:
                common["quantization_config"] = quantization
            model = load_pretrained(source, dtype=dtype, **common, **where)
    except torch.OutOfMemoryError:
        raise
    except UnfitModelError as error:
        raise model_not_found(config, source, str(error)) from error
    except Exception as error:  # loaders raise whatever their file formats raise
        problem = wrong_generation_settings(source, common["revision"]) or (
            f"cannot be loaded as a causal language model from safetensors ({first_line(error)})"
        )
        raise model_not_found(config, source, problem) from error
    return model


def keep_layers(model: Any, config: StudentConfig) -> Any:
    """Removes all layers but `config.keep_layers`, in place; keeps all if it is empty."""
    if not config.keep_layers:
        return model
    total = model.config.num_hidden_layers
    if config.keep_layers[-1] >= total:
        raise invalid_field(
            "student.keep_layers",
            f"{config.keep_layers[-1]} is not a layer of {config.model}, whose {total} layers count from 0.",
        )
    holders = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    if len(holders) != 1:
        raise invalid_field(
            "student.keep_layers",
            f"{config.model} does not hold its {total} layers in one list, so a subset cannot be selected; leave it out.",
        )
    holder, name = holders[0]
    kept = nn.ModuleList([getattr(holder, name)[each] for each in config.keep_layers])
    for number, layer in enumerate(kept):
        module: Any
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # its index in the KV cache
    setattr(holder, name, kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[each] for each in config.keep_layers]
    return model


def merge_adapter(model: Any, config: StudentConfig, data_dir: Path, adapter: Path) -> Any:
    """Merges base and adapter in full precision; `adapter` is the saved adapter.

    A quantised base is dequantised to the weights that the adapter was trained with, not those of its checkpoint.
    """
    if config.quantization == "none":
        return merge(model)
    import peft

    quantized = _load_quantized(config, data_dir, torch.float32, torch.device("cpu"))
    base = keep_layers(quantized, config).dequantize()
    base.generation_config = model.get_base_model().generation_config
    return merge(peft.PeftModel.from_pretrained(base, adapter))


def _load_quantized(config: StudentConfig, data_dir: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    if config.from_config:
        raise invalid_field(
            "student.quantization",
            "freezes the base, and random weights (from_config) need no freezing.",
        )
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if config.quantization == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    )
    model = load_base(config, data_dir, dtype, settings, device_map={"": device})
    for module in model.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights in the first evaluation, in a form without gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def model_source(config: StudentConfig, data_dir: Path) -> str:
    """Returns a directory, or the hub id. Raises StillhouseError(MODEL_NOT_FOUND) for a path that does not exist."""
    path = resolve(config.model, data_dir)
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        raise model_not_found(config, str(path), "has no config.json")
    if (
        path.is_absolute()
        or config.model.startswith(("./", "../", "~", "runs/"))
        or config.model.count("/") > 1
    ):
        raise model_not_found(config, str(path), "is not a directory on the trainer's host")
    return config.model


def model_not_found(config: StudentConfig, source: str, problem: str) -> StillhouseError:
    """Returns the MODEL_NOT_FOUND error for the student's model; `problem` completes the sentence."""
    where = f"{config.model} ({source})" if source != config.model else source
    return StillhouseError(
        Reason.MODEL_NOT_FOUND,
        f"student.model {where} {problem}. Correct that, or give another model: a directory in Hugging Face layout with "
        "safetensors on the trainer's host, or the id of a model that this host can download.",
        resource=config.model,
    )
