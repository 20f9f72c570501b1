"""Validates an adapter's files against the served model, since vLLM silently accepts weights of other shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stillhouse.teacher_service.engines.vllm.errors import first_line
from stillhouse.teacher_service.models.adapter_files import adapter_invalid
from stillhouse.teacher_service.models.fingerprint import weight_files

Shapes = Mapping[str, frozenset[tuple[int, ...]]]
"""Shapes of the model's matrices by module, such as "layers.0.self_attn.q_proj"; empty where they are packed."""


def check_weights(name: str, path: Path, shapes: Shapes, model_files: Iterable[Path]) -> None:
    """Raises `StillhouseError` (ADAPTER_INVALID) for weights that are not finite, or of no matrix in `shapes`, or that
    replace one in `model_files`, which vLLM ignores."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - it is no mapping
                tensor = weights.get_tensor(key)
                if not bool(tensor.isfinite().all()):
                    raise adapter_invalid(name, f"its weight {key} holds NaN or infinite values")
                _check_fit(name, key, tuple(tensor.shape), shapes)
                if ".lora_" not in key and not _is_in(model_files, key, tensor):
                    raise adapter_invalid(
                        name,
                        f"it replaces a weight of the model, {key}, and the vllm engine applies LoRA matrices alone",
                    )
    except (OSError, SafetensorError) as error:
        raise adapter_invalid(name, f"its {path.name} cannot be read ({first_line(error)})") from error


def _is_in(model_files: Iterable[Path], key: str, tensor: Any) -> bool:
    """True for a copy of the model's own weight, which peft saves beside an adapted embedding."""
    from safetensors import safe_open

    plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
    for path in model_files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                if plain in weights.keys():  # noqa: SIM118 - it is no mapping
                    base = weights.get_tensor(plain)
                    return bool(base.equal(tensor.to(base.dtype)))
    return False


def _check_fit(name: str, key: str, shape: tuple[int, ...], shapes: Shapes) -> None:
    """Checks lora_A [rank, in] and lora_B [out, rank] of a matrix [out, in], which some models store transposed."""
    module, _, part = key.rpartition(".lora_")
    place = _place(module)
    if place is None or part not in {"A.weight", "B.weight"} or len(shape) != 2:
        return
    known = shapes.get(place)
    if known is None:
        kind = place.rpartition(".")[2]
        if any(other.endswith(f".{kind}") for other in shapes):
            raise adapter_invalid(name, f"it adapts {place}, which this model does not have")
        return  # modules that vLLM fuses, or whose matrices are packed
    width = shape[1] if part == "A.weight" else shape[0]
    if not any(width in matrix for matrix in known):
        raise adapter_invalid(
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
