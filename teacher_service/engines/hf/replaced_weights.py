"""Weights of the base that an adapter replaces: biases, saved modules, rows of tokens. They take the base's place only while
the adapter is active, by reference, so that the base keeps its bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.teacher_service.models.adapter_files import adapter_invalid

_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class ReplacedWeight:
    """A parameter of one module, of the base and of the adapter."""

    module: nn.Module
    name: str
    base: nn.Parameter
    own: nn.Parameter

    def select(self, *, own: bool) -> None:
        """Puts the adapter's parameter, or the base's, in its place. A tied module keeps its own reference."""
        self.module._parameters[self.name] = self.own if own else self.base


def replaced_weights(
    model: Any, name: str, config: Any, weights: Mapping[str, Tensor]
) -> list[ReplacedWeight]:
    """Pairs the weights of an adapter that are no LoRA matrices with those of the base that they replace.

    `weights` have the keys of the model. Those equal to the base's are left out. Raises `StillhouseError`
    (ADAPTER_INVALID) for a weight that the model does not have, and for one that the configuration announces and the
    file lacks.
    """
    modules = _base_modules(model)
    embedding = _embedding(model)
    saved = set(_saved_modules(config, modules))
    found: dict[tuple[str, str], ReplacedWeight] = {}
    for key, given in weights.items():
        plain = key.replace(".base_layer", "")
        is_rows = plain.endswith(_TOKENS)
        place, _, parameter = (plain.removesuffix(_TOKENS) + ".weight" if is_rows else plain).rpartition(".")
        module = modules.get(place)
        base = None if module is None else module._parameters.get(parameter)
        if module is None or base is None or not base.is_floating_point():
            raise adapter_invalid(name, f"its weight {key} has no counterpart in this model")
        value = given
        if is_rows:
            value = _with_rows(name, key, base, _token_indices(config, place, module is embedding), given)
        if value.shape != base.shape:
            raise adapter_invalid(
                name,
                f"its weight {key} is {list(value.shape)}, and that of this model is {list(base.shape)}; serve the base that "
                "it was trained on, such as one whose embeddings were resized for new tokens",
            )
        own = nn.Parameter(value.to(device=base.device, dtype=base.dtype), requires_grad=False)
        found[place, parameter] = ReplacedWeight(module, parameter, base, own)
        # A saved module is a copy of its own; other weights are those of all modules that share them.
        if getattr(config, "ensure_weight_tying", False) or not (
            place in saved or (is_rows and module is not embedding)
        ):
            for other, partner in modules.items():
                if partner._parameters.get(parameter) is base:
                    found.setdefault((other, parameter), ReplacedWeight(partner, parameter, base, own))
    _require_announced(
        name, config, modules, embedding=embedding, saved=saved, found={".".join(place) for place in found}
    )
    return [each for each in found.values() if not torch.equal(each.own, each.base)]


def lora_targets(model: Any, slot: str) -> Iterator[str]:
    """Yields the names of the modules that the adapter of a slot adapts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for place, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and slot in module._all_available_adapter_names():
            yield place.replace(".base_layer", "")


def require_biases(model: Any, name: str, slot: str, weights: Iterable[str]) -> None:
    """Raises `StillhouseError` (ADAPTER_INVALID) where a module of a slot has a bias of the base, trained but not among
    these weights."""
    modules = _base_modules(model)
    given = {key.replace(".base_layer", "") for key in weights}
    for place in lora_targets(model, slot):
        if modules[place]._parameters.get("bias") is not None and f"{place}.bias" not in given:
            raise _lacks(name, "bias", f"{place}.bias")


def _base_modules(model: Any) -> dict[str, nn.Module]:
    """Modules by the name that they have without adapters."""
    # A wrapped module comes later than its wrapper.
    return {place.replace(".base_layer", ""): module for place, module in model.named_modules()}


def _with_rows(name: str, key: str, base: Tensor, indices: list[int], rows: Tensor) -> Tensor:
    if len(indices) != len(rows) or rows.shape[1:] != base.shape[1:]:
        raise adapter_invalid(
            name,
            f"its weight {key} is {list(rows.shape)} for {len(indices)} tokens of width {base.shape[-1]}",
        )
    if indices and not 0 <= min(indices) <= max(indices) < len(base):
        raise adapter_invalid(
            name, f"its trainable_token_indices reach beyond the {len(base)} tokens of this model"
        )
    changed = base.detach().clone()
    changed[torch.tensor(indices, device=base.device)] = rows.to(device=base.device, dtype=base.dtype)
    return changed


def _token_indices(config: Any, place: str, is_embedding: bool) -> list[int]:
    indices = config.trainable_token_indices or []
    if isinstance(indices, Mapping):
        return list(next((each for layer, each in indices.items() if _is_at(place, layer)), []))
    return list(indices) if is_embedding else []


def _embedding(model: Any) -> nn.Module:
    module = model.get_input_embeddings()
    base: nn.Module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return base


def _saved_modules(config: Any, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    for wanted in config.modules_to_save or ():
        for place, module in modules.items():
            if _is_at(place, wanted):
                for inner, _ in module.named_modules(prefix=place):
                    yield inner.replace(".base_layer", "")


def _require_announced(
    name: str,
    config: Any,
    modules: Mapping[str, nn.Module],
    *,
    embedding: nn.Module,
    saved: set[str],
    found: set[str],
) -> None:
    """Raises `StillhouseError` for weights that the configuration says are trained and the file does not have."""
    indices = config.trainable_token_indices or ()
    for place, module in modules.items():
        for parameter, weight in module._parameters.items():
            announced = ""
            if place in saved:
                announced = "modules_to_save"
            elif config.bias == "all" and parameter == "bias" and ".lora_" not in place:
                announced = "bias"
            elif indices and not isinstance(indices, Mapping) and module is embedding:
                announced = "trainable_token_indices"
            if announced and weight is not None and f"{place}.{parameter}" not in found:
                raise _lacks(name, announced, f"{place}.{parameter}")
    for layer in indices if isinstance(indices, Mapping) else ():
        if not any(_is_at(each.rpartition(".")[0], layer) for each in found):
            raise _lacks(name, "trainable_token_indices", layer)


def _lacks(name: str, field: str, weight: str) -> Exception:
    return adapter_invalid(
        name,
        f"its configuration says that it trains {weight} ({field}), and its file does not have it; save it again, or "
        f"take {field} out of its configuration to serve it without",
    )


def _is_at(place: str, wanted: str) -> bool:
    return place == wanted or place.endswith(f".{wanted}")
