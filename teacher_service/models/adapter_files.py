"""Consistency of an adapter's two files: weights of a rank that the configuration does not name would be scaled wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.files.adapter import FILES


def check_ranks(name: str, directory: Path) -> None:
    """Raises `StillhouseError` with ADAPTER_INVALID unless every matrix has a rank that the configuration names."""
    from safetensors import SafetensorError, safe_open

    config_path, weights_path = (directory / file for file in FILES)
    try:
        named = _ranks(json.loads(config_path.read_bytes()))
        with safe_open(weights_path, framework="numpy") as weights:
            shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise _invalid(name, f"its files cannot be read ({first_line(error)})") from error
    if not shapes:
        raise _invalid(name, f"its {FILES[1]} holds no weights")
    for key, shape in shapes.items():
        rank = _rank(key, shape)
        if rank is not None and rank not in named:
            raise _invalid(
                name, f"its weight {key} has rank {rank}, and its configuration says {sorted(named)}"
            )


def _ranks(config: dict[str, Any]) -> set[int]:
    return {config.get("r", 8), *(config.get("rank_pattern") or {}).values()}


def _rank(key: str, shape: tuple[int, ...]) -> int | None:
    """lora_A is [rank, in] and lora_B [out, rank]; other weights have none."""
    if len(shape) != 2:
        return None
    if key.endswith(".lora_A.weight"):
        return shape[0]
    return shape[1] if key.endswith(".lora_B.weight") else None


def _invalid(name: str, why: str) -> StillhouseError:
    return StillhouseError(
        Reason.ADAPTER_INVALID, f"Adapter {name!r} cannot be loaded: {why}.", resource=name
    )
