"""The settings of a LoRA adapter: those with which it would be computed otherwise than it was trained are refused by field."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

UNSERVED = (
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
"""Fields of an adapter that belongs to another base, or needs another forward pass, than the one that is loaded."""
CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of values of init_lora_weights with which peft trains on a base that it has changed."""
_BIASES = ("none", "all", "lora_only")
_SWITCHES = ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
_LABELS = frozenset({"peft_version", "auto_mapping", "revision", "task_type"})
"""Fields that change nothing, which versions of peft may not have."""
_SHOWN_CHARS = 80


class AdapterConfigError(ValueError):
    """Settings that are refused; the text completes the sentence "its …", and ends with the remedy where there is one."""


def check_lora_config(config: Any, known: Collection[str]) -> Mapping[str, Any]:
    """Returns the settings of an adapter, as they were parsed, if they mean what they say; `known` are the fields of peft's LoraConfig.

    Raises AdapterConfigError.
    """
    if not isinstance(config, dict):
        raise AdapterConfigError("configuration is no JSON object")
    if config.get("peft_type") != "LORA":
        raise AdapterConfigError(f"peft_type is {_shown(config.get('peft_type'))}, and only LORA is taken")
    for field in UNSERVED:
        if config.get(field):
            raise AdapterConfigError(
                f"{field} is {_shown(config[field])}, which is not computed; train it without {field}"
            )
    for field, value in config.items():
        if value and field not in known and field not in _LABELS:
            raise AdapterConfigError(
                f"{field} is {_shown(value)}, which the installed version of peft does not know; upgrade peft, or take "
                f"{field} out of the configuration if it changes nothing that is computed"
            )
    _check_values(config)
    return config


def _check_values(config: Mapping[str, Any]) -> None:
    """Raises AdapterConfigError for a value that is of another kind than its field."""
    for field in _SWITCHES:
        if config.get(field) not in (None, True, False):
            raise AdapterConfigError(f"{field} is {_shown(config[field])}; it must be true or false")
    if config.get("bias", "none") not in _BIASES:
        raise AdapterConfigError(f"bias is {_shown(config['bias'])}; it must be one of {', '.join(_BIASES)}")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise AdapterConfigError(
                f"{field} is {_shown(config[field])}; it must be an object from names to numbers"
            )
    ranks = {"rank r": config.get("r", 8)} | _named("rank_pattern", config)
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise AdapterConfigError(f"{name} is {_shown(rank)}, which is not a positive integer")
    alphas = {"lora_alpha": config.get("lora_alpha", 8)} | _named("alpha_pattern", config)
    for name, alpha in alphas.items():
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not math.isfinite(alpha):
            raise AdapterConfigError(f"{name} is {_shown(alpha)}; it must be a finite number")


def _named(field: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{field}.{name}": value for name, value in (config.get(field) or {}).items()}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
