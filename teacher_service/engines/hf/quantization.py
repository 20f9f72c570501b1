"""Quantisation in the reference engine: maps a method's name to transformers' configuration, and reports what does
not work here."""

from __future__ import annotations

import logging
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError, first_line

_FOUR_BIT = ("bitsandbytes", "bitsandbytes_4bit")
_EIGHT_BIT = "bitsandbytes_8bit"
_RUN_FILE = {"nf4": _FOUR_BIT[1], "int8": _EIGHT_BIT}
"""Words of `student.quantization` in a run file."""


def method_of(model: Any, method: str) -> str:
    """Quantisation method of the model: as requested, else as its checkpoint declares; empty if none."""
    if method:
        name = _normal(method)
        return _FOUR_BIT[1] if name in _FOUR_BIT else name
    found = getattr(getattr(model.config, "quantization_config", None), "quant_method", "")
    return str(getattr(found, "value", found))


def configuration(method: str, dtype: Any) -> Any:
    """Builds transformers' configuration of a method, with its defaults. Raises `StillhouseError` (INVALID_CONFIG)."""
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as METHODS

    name = _normal(method)
    try:
        if name in _FOUR_BIT:
            return transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        if name == _EIGHT_BIT:
            # It would warn at every matmul that it computes in float16.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        if name in METHODS:
            return METHODS[name]()
    except (TypeError, ValueError, ImportError) as error:
        raise refused(method, error) from error
    raise StillhouseError(
        Reason.INVALID_CONFIG,
        f"--quantization is {method}; known are {', '.join(_RUN_FILE)}, and to transformers {', '.join(sorted(METHODS))}. Choose one of these, or --engine vllm.",
    )


def keep_layout(model: Any) -> None:
    """Keeps the weights of 4-bit layers as loaded.

    On some CPUs bitsandbytes repacks them at first use. Unpacking, which every read of the state dict does, and with
    it peft's loading of an adapter, does not restore the original.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def refused(method: str, error: Exception) -> StillhouseError:
    """Builds the error for a method that transformers cannot load on this machine."""
    return StillhouseError(
        Reason.INVALID_CONFIG,
        f"transformers does not quantise this model by {method} here: {first_line(error).rstrip('.')}. Choose another --quantization, or none.",
    )


def _normal(method: str) -> str:
    name = method.lower().replace("-", "_")
    return _RUN_FILE.get(name, name)
