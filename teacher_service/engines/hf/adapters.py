"""LoRA adapters inside a transformers model: several are injected, at most one is active, and the base keeps its bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.files.adapter import WEIGHTS
from stillhouse.teacher_service.engines.hf.replaced_weights import (
    ReplacedWeight,
    replaced_weights,
    require_biases,
)
from stillhouse.teacher_service.models.adapter_files import (
    adapter_invalid,
    adapter_not_found,
    check_config,
    require_slot,
)


class LoraSlots:
    """Adapters of one model. Not thread-safe: called by the thread that owns the model."""

    def __init__(self, model: Any, *, max_adapters: int, max_rank: int) -> None:
        self._model = model
        self._max_adapters = max_adapters
        self._max_rank = max_rank
        self.slots: dict[str, str] = {}
        """Slot of each loaded adapter by name: torch forbids dots in module names, so slots have names of their own."""
        self._replaced: dict[str, list[ReplacedWeight]] = {}
        """Weights of the base that a slot's adapter replaces while it is active."""
        self._count = 0
        self._active_name: str | None = ""
        """None if it is not known. A model without slots is its base: peft is imported with the first adapter."""

    def load(self, name: str, path: Path) -> int:
        """Injects an adapter; returns its rank.

        Raises `StillhouseError` with ADAPTER_SLOTS or ADAPTER_INVALID; the model is then unchanged.
        """
        from safetensors.torch import load_file

        require_slot(self.slots, self._max_adapters)
        rank = check_config(name, path, max_rank=self._max_rank)
        self.activate("")
        slot = f"slot{self._count}"
        self._count += 1
        try:
            # From the keys of peft's wrapper to those of the model itself.
            weights = {
                key.removeprefix("base_model.model."): value
                for key, value in load_file(path / WEIGHTS).items()
            }
            _require_finite(name, weights)
            self._inject(name, slot, path, weights)
        except Exception as error:  # libraries raise any type on malformed files
            self._remove(slot)
            if isinstance(error, StillhouseError):
                raise
            raise adapter_invalid(name, _why(error)) from error
        self._model.eval()
        self.slots[name] = slot
        self._active_name = None  # peft has activated it where it made a layer
        return rank

    def _inject(self, name: str, slot: str, path: Path, weights: dict[str, torch.Tensor]) -> None:
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        lora = LoraConfig.from_pretrained(str(path))
        lora.inference_mode = True
        others = {key: value for key, value in weights.items() if ".lora_" not in key}
        self._replaced[slot] = replaced_weights(self._model, name, lora, others)
        bias = lora.bias
        # peft would write these into the base, or wrap it in modules that are not removed.
        lora.bias, lora.modules_to_save, lora.trainable_token_indices = "none", None, None
        with warnings.catch_warnings():
            # They advise on training and merging, and on several adapters in one model, which are intended here.
            warnings.simplefilter("ignore", UserWarning)
            inject_adapter_in_model(lora, self._model, adapter_name=slot)
        matrices = {key: value for key, value in weights.items() if ".lora_" in key}
        outcome = set_peft_model_state_dict(self._model, matrices, adapter_name=slot)
        _require_fit(
            name, outcome.unexpected_keys, [key for key in outcome.missing_keys if f".{slot}" in key]
        )
        if bias == "lora_only":
            require_biases(self._model, name, slot, others)

    def unload(self, name: str) -> None:
        """Removes the adapter from the model."""
        self.activate("")
        self._remove(self.slots.pop(name))

    def merge(self, name: str) -> None:
        """Merges the adapter into the weights that it changes, and removes all slots.

        Raises `StillhouseError` (ADAPTER_INVALID) for an adapter that its base has no place for; the model is then spoilt.
        """
        self.activate(name)
        slot = self.slots[name]
        for module in list(self._model.modules()):
            for child_name, child in list(module.named_children()):
                if _is_adapted(child):
                    try:
                        child.merge(safe_merge=True, adapter_names=[slot])
                    except (RuntimeError, ValueError) as error:
                        raise adapter_invalid(name, f"it cannot be merged ({_why(error)})") from error
                    setattr(module, child_name, child.get_base_layer())
        self.slots.clear()
        self._replaced.clear()
        self._active_name = ""

    def activate(self, name: str) -> None:
        """Activates an adapter for the next forward passes; an empty name selects the base model."""
        if name == self._active_name:
            return
        if name and name not in self.slots:
            raise adapter_not_found(name, self.slots)
        if self._active_name:
            for weight in self._replaced[self.slots[self._active_name]]:
                weight.select(own=False)
        for layer in self._layers():
            if name:
                layer.set_adapter(self.slots[name], inference_mode=True)
            # The layer's own method would make frozen weights trainable again.
            layer._disable_adapters = not name
        if name:
            for weight in self._replaced[self.slots[name]]:
                weight.select(own=True)
        self._active_name = name

    def _remove(self, slot: str) -> None:
        """Removes a slot, as far as it was made, and the layers that held no other."""
        self._replaced.pop(slot, None)
        self._active_name = None
        getattr(self._model, "peft_config", {}).pop(slot, None)
        for layer in self._layers():
            layer.set_adapter([])
            layer.delete_adapter(slot)
        for module in list(self._model.modules()):
            for child_name, child in list(module.named_children()):
                inner = child
                while _is_adapted(inner) and not inner._all_available_adapter_names():
                    inner = inner.base_layer
                if inner is not child:
                    setattr(module, child_name, inner)

    def _layers(self) -> list[Any]:
        return [module for module in self._model.modules() if _is_adapted(module)]


def _is_adapted(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _why(error: Exception) -> str:
    """First informative line of an exception; torch's for mismatched weights begins with a headline."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), type(error).__name__)


def _require_fit(name: str, unexpected: list[str], missing: list[str]) -> None:
    if unexpected or missing:
        raise adapter_invalid(
            name, f"its weights do not fit its configuration or the model: {(*unexpected, *missing)[:3]}"
        )


def _require_finite(name: str, weights: dict[str, torch.Tensor]) -> None:
    for key, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise adapter_invalid(name, f"its weight {key} holds NaN or infinite values")
