"""An adapter's two files, and the refusals of adapters that both engines share: weights of a rank that the configuration
does not name would be scaled wrongly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.files.adapter import CONFIG, FILES
from stillhouse.protos.files.adapter_config import CHANGING_INITS, AdapterConfigError, check_lora_config
from stillhouse.protos.files.weight_types import PLAIN_TYPES

MAX_NAME_CHARS = 128


def check_ranks(name: str, directory: Path) -> None:
    """Raises `StillhouseError` with ADAPTER_INVALID unless every matrix has a rank that the configuration names."""
    from safetensors import SafetensorError, safe_open

    config_path, weights_path = (directory / file for file in FILES)
    try:
        config = json.loads(config_path.read_bytes())
        named = {config.get("r", 8), *(config.get("rank_pattern") or {}).values()}
        with safe_open(weights_path, framework="numpy") as weights:
            slices = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118
            shapes = {key: tuple(each.get_shape()) for key, each in slices.items()}
            dtypes = {key: str(each.get_dtype()) for key, each in slices.items()}
    except SafetensorError as error:
        raise adapter_invalid(
            name,
            f"its {FILES[1]}, of {weights_path.stat().st_size} bytes, cannot be read ({first_line(error)}); fetch or save "
            "it again",
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise adapter_invalid(name, f"its files cannot be read ({first_line(error)})") from error
    if not shapes:
        raise adapter_invalid(name, f"its {FILES[1]} holds no weights")
    for key, dtype in dtypes.items():
        if dtype not in PLAIN_TYPES:
            raise adapter_invalid(
                name, f"its weight {key} is of type {dtype}; save it in float32, bfloat16 or float16"
            )
    for key, shape in shapes.items():
        rank = _rank(key, shape)
        if rank is not None and rank not in named:
            raise adapter_invalid(
                name, f"its weight {key} has rank {rank}, and its configuration says {sorted(named)}"
            )


def check_config(name: str, directory: Path, *, max_rank: int) -> int:
    """Validates an adapter's configuration; returns its largest rank. Raises `StillhouseError` (ADAPTER_INVALID)."""
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    try:
        config = check_lora_config(json.loads((directory / CONFIG).read_bytes()), known)
    except AdapterConfigError as error:
        raise adapter_invalid(name, f"its {error}") from error
    except (OSError, ValueError) as error:
        raise adapter_invalid(name, f"its {CONFIG} cannot be read ({first_line(error)})") from error
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGING_INITS):
        raise adapter_invalid(
            name,
            f"its init_lora_weights is {init!r}: it was trained on a changed base. Convert it with peft's "
            "path_initial_model_for_weight_conversion; or set init_lora_weights to true, if --model is that changed base",
        )
    rank = int(max(config.get("r", 8), *(config.get("rank_pattern") or {}).values(), 1))
    if rank > max_rank:
        raise adapter_invalid(
            name, f"its rank is {rank}, and this teacher takes at most --max-lora-rank {max_rank}"
        )
    return rank


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
