"""Validates an adapter's files against the served model, since vLLM silently accepts weights of other shapes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.engines.vllm.errors import first_line
from stillhouse.teacher_service.models.fingerprint import weight_files

Shapes = Mapping[str, frozenset[tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRules:
    """Limits on the adapters of one model."""

    max_rank: int
    """Largest rank."""
    shapes: Shapes
    """Shapes of the model's matrices by module, such as "layers.0.self_attn.q_proj"; empty where they are packed."""

    def check(self, name: str, directory: Path) -> int:
        """Validates an adapter; returns its rank. Raises `StillhouseError` (ADAPTER_INVALID) with the defect."""
        rank = self._check_config(name, directory / "adapter_config.json")
        self._check_weights(name, directory / "adapter_model.safetensors")
        return rank

    def _check_config(self, name: str, path: Path) -> int:
        try:
            config = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise invalid(name, f"its {path.name} cannot be read ({first_line(error)})") from error
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            kind = config.get("peft_type") if isinstance(config, dict) else "no object"
            raise invalid(name, f"its peft_type is {kind!r}, and only LORA is served")
        patterns = config.get("rank_pattern") or {}
        ranks = []
        for rank in (config.get("r"), *(patterns.values() if isinstance(patterns, dict) else [patterns])):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise invalid(name, f"its rank r is {rank!r}, which is not a positive integer")
            if rank > self.max_rank:
                raise invalid(
                    name,
                    f"its rank is {rank}, and this teacher takes at most --max-lora-rank {self.max_rank}",
                )
            ranks.append(rank)
        return max(ranks)

    def _check_weights(self, name: str, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - it is no mapping
                    tensor = weights.get_tensor(key)
                    if not bool(tensor.isfinite().all()):
                        raise invalid(name, f"its weight {key} holds NaN or infinite values")
                    self._check_fit(name, key, tuple(tensor.shape))
        except (OSError, SafetensorError) as error:
            raise invalid(name, f"its {path.name} cannot be read ({first_line(error)})") from error

    def _check_fit(self, name: str, key: str, shape: tuple[int, ...]) -> None:
        """Checks lora_A [rank, in] and lora_B [out, rank] of a matrix [out, in], which some models store transposed."""
        module, _, part = key.rpartition(".lora_")
        place = _place(module)
        if place is None or part not in {"A.weight", "B.weight"} or len(shape) != 2:
            return
        known = self.shapes.get(place)
        if known is None:
            kind = place.rpartition(".")[2]
            if any(other.endswith(f".{kind}") for other in self.shapes):
                raise invalid(name, f"it adapts {place}, which this model does not have")
            return  # modules that vLLM fuses, or whose matrices are packed
        width = shape[1] if part == "A.weight" else shape[0]
        if not any(width in matrix for matrix in known):
            raise invalid(
                name, f"its weight {key} is {list(shape)}, and {place} of this model is {list(min(known))}"
            )


def matrix_shapes(directory: Path) -> Shapes:
    """Shapes of the matrices in the model's layers, from the headers of its weight files."""
    from safetensors import safe_open

    found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for path in weight_files(directory):
        if path.suffix != ".safetensors":
            return {}
        with safe_open(path, framework="pt") as weights:
            for module, shape in _matrices(weights):
                found[module].add(shape)
    return {module: frozenset(shapes) for module, shapes in found.items()}


def _matrices(weights: Any) -> Iterable[tuple[str, tuple[int, ...]]]:
    for key in weights.keys():  # noqa: SIM118 - it is no mapping
        place = _place(key.removesuffix(".weight"))
        if place is None or not key.endswith(".weight"):
            continue
        view = weights.get_slice(key)
        if len(view.get_shape()) == 2 and view.get_dtype() in {"F32", "F16", "BF16"}:
            yield place, tuple(view.get_shape())


def _place(module: str) -> str | None:
    """Module name from its layer on; the prefix differs between files of one model."""
    _, found, rest = module.rpartition("layers.")
    return f"layers.{rest}" if found else None


def invalid(name: str, why: str) -> StillhouseError:
    """Builds the error for an adapter that is not loaded."""
    return StillhouseError(
        Reason.ADAPTER_INVALID, f"Adapter {name!r} cannot be loaded: {why.rstrip('.')}.", resource=name
    )
