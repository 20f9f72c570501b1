"""An adapter's two files, and the refusals of adapters that both engines share: weights of a rank that the configuration
does not name would be scaled wrongly."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.files.adapter import CONFIG, FILES

MAX_NAME_CHARS = 128
# An adapter with one of these belongs to another base, or needs another forward pass, than the one that is served.
_UNSERVED = (
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")


def check_ranks(name: str, directory: Path) -> None:
    """Raises `StillhouseError` with ADAPTER_INVALID unless every matrix has a rank that the configuration names."""
    from safetensors import SafetensorError, safe_open

    config_path, weights_path = (directory / file for file in FILES)
    try:
        config = json.loads(config_path.read_bytes())
        named = {config.get("r", 8), *(config.get("rank_pattern") or {}).values()}
        with safe_open(weights_path, framework="numpy") as weights:
            shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise adapter_invalid(name, f"its files cannot be read ({first_line(error)})") from error
    if not shapes:
        raise adapter_invalid(name, f"its {FILES[1]} holds no weights")
    for key, shape in shapes.items():
        rank = _rank(key, shape)
        if rank is not None and rank not in named:
            raise adapter_invalid(
                name, f"its weight {key} has rank {rank}, and its configuration says {sorted(named)}"
            )


def check_config(name: str, directory: Path, *, max_rank: int) -> int:
    """Validates an adapter's configuration; returns its largest rank. Raises `StillhouseError` (ADAPTER_INVALID)."""
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise adapter_invalid(name, f"its {CONFIG} cannot be read ({first_line(error)})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else "no object"
        raise adapter_invalid(name, f"its peft_type is {kind!r}, and only LORA is served")
    _require_served(name, config)
    patterns = config.get("rank_pattern") or {}
    ranks: list[Any] = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise adapter_invalid(name, f"its rank r is {rank!r}, which is not a positive integer")
        if rank > max_rank:
            raise adapter_invalid(
                name, f"its rank is {rank}, and this teacher takes at most --max-lora-rank {max_rank}"
            )
    return int(max(ranks))


def check_matrices_only(name: str, directory: Path) -> None:
    """Raises `StillhouseError` (ADAPTER_INVALID) for an adapter that trains more of the base than LoRA matrices."""
    config = json.loads((directory / CONFIG).read_bytes())
    for field in ("modules_to_save", "trainable_token_indices", "bias", "lora_bias", "use_dora"):
        value = config.get(field)
        if value and value != "none":
            raise adapter_invalid(
                name,
                f"its {field} is {value!r}, which the vllm engine does not apply. Serve it with --engine hf, merge it with "
                f"`stillhouse-teacher merge-adapter`, or train it without {field}",
            )


def _require_served(name: str, config: dict[str, Any]) -> None:
    for field in _UNSERVED:
        if config.get(field):
            raise adapter_invalid(
                name, f"its {field} is {config[field]!r}, which no engine serves; train it without {field}"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGING_INITS):
        raise adapter_invalid(
            name,
            f"its init_lora_weights is {init!r}: it was trained on a changed base. Convert it with peft's "
            "path_initial_model_for_weight_conversion; or set init_lora_weights to true, if --model is that changed base",
        )


def require_slot(loaded: Collection[str], max_adapters: int) -> None:
    """Raises `StillhouseError` with ADAPTER_SLOTS where all slots are taken by the adapters of these names."""
    if len(loaded) >= max_adapters:
        raise StillhouseError(
            Reason.ADAPTER_SLOTS,
            f"All {max_adapters} adapter slots are taken by {', '.join(loaded) or 'nothing'}. "
            "Unload one, or start the teacher with a larger --max-adapters.",
        )


def adapter_not_found(name: str, loaded: Collection[str]) -> StillhouseError:
    """Builds the error for a name that is not among those loaded."""
    name = name[:MAX_NAME_CHARS]
    return StillhouseError(
        Reason.ADAPTER_NOT_FOUND,
        f"There is no adapter {name!r}; loaded are: {', '.join(loaded) or 'none'}. Load it with LoadAdapter, or start the "
        "teacher with --adapter NAME=PATH.",
        resource=name,
    )


def adapter_invalid(name: str, why: str) -> StillhouseError:
    """Builds the error for an adapter that is not loaded."""
    return StillhouseError(
        Reason.ADAPTER_INVALID, f"Adapter {name!r} cannot be loaded: {why.rstrip('.')}.", resource=name
    )


def _rank(key: str, shape: tuple[int, ...]) -> int | None:
    """lora_A is [rank, in] and lora_B [out, rank]; other weights have none."""
    if len(shape) != 2:
        return None
    if key.endswith(".lora_A.weight"):
        return shape[0]
    return shape[1] if key.endswith(".lora_B.weight") else None
