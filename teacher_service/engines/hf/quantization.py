"""Quantisation in the reference engine: a method's name becomes transformers' own configuration, and transformers says whether it works here."""

from __future__ import annotations

import logging
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError

_FOUR_BIT = ("bitsandbytes", "bitsandbytes_4bit")
_EIGHT_BIT = "bitsandbytes_8bit"


def method_of(model: Any, asked: str) -> str:
    """What the model is quantised by: what was asked for, else what its checkpoint says; empty if by nothing."""
    if asked:
        name = _normal(asked)
        return _FOUR_BIT[1] if name in _FOUR_BIT else name
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "")
    return str(getattr(method, "value", method))


def configuration(asked: str, dtype: Any) -> Any:
    """transformers' configuration of a method, with its own defaults. Raises `StillhouseError` (INVALID_CONFIG)."""
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as METHODS

    name = _normal(asked)
    try:
        if name in _FOUR_BIT:
            return transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        if name == _EIGHT_BIT:
            # It would say at every product that it computes in float16.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        if name in METHODS:
            return METHODS[name]()
    except (TypeError, ValueError, ImportError) as error:
        raise refused(asked, error) from error
    raise StillhouseError(
        Reason.INVALID_CONFIG,
        f"--quantization is {asked}; transformers knows {', '.join(sorted(METHODS))}. Choose one of these, or --engine vllm.",
    )


def keep_layout(model: Any) -> None:
    """Keeps the weights of 4 bit layers as they were loaded.

    On some CPUs bitsandbytes repacks them at their first use. Taking them apart again, as every reading of the model's
    state does and with it peft's loading of an adapter, does not give back what was there.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def refused(asked: str, error: Exception) -> StillhouseError:
    """Why transformers does not load a model with this method on this machine."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    why = lines[0] if lines else type(error).__name__
    return StillhouseError(
        Reason.INVALID_CONFIG,
        f"transformers does not quantise this model by {asked} here: {why}. Choose another --quantization, or none.",
    )


def _normal(asked: str) -> str:
    return asked.lower().replace("-", "_")
