"""LoRA adapters inside a transformers model: several are injected, at most one is active."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.files.adapter import WEIGHTS
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
        self._count = 0
        self._active_name: str | None = None

    def load(self, name: str, path: Path) -> int:
        """Injects an adapter; returns its rank.

        Raises `StillhouseError` with ADAPTER_SLOTS or ADAPTER_INVALID; the model is then unchanged.
        """
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
        from safetensors.torch import load_file

        require_slot(self.slots, self._max_adapters)
        rank = check_config(name, path, max_rank=self._max_rank)
        slot = f"slot{self._count}"
        self._count += 1
        try:
            lora = LoraConfig.from_pretrained(str(path))
            lora.inference_mode = True
            # From the keys of peft's wrapper to those of the model itself.
            weights = {
                key.removeprefix("base_model.model."): value
                for key, value in load_file(path / WEIGHTS).items()
            }
            _require_finite(name, weights)
            with warnings.catch_warnings():  # several adapters in one model are intended here
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                inject_adapter_in_model(lora, self._model, adapter_name=slot)
            outcome = set_peft_model_state_dict(self._model, weights, adapter_name=slot)
            _require_fit(
                name, outcome.unexpected_keys, [key for key in outcome.missing_keys if f".{slot}" in key]
            )
        except Exception as error:  # libraries raise any type on malformed files
            self._remove(slot)
            if isinstance(error, StillhouseError):
                raise
            raise adapter_invalid(name, _why(error)) from error
        self._model.eval()
        self.slots[name] = slot
        self._active_name = None
        return rank

    def unload(self, name: str) -> None:
        """Removes the adapter from the model."""
        self._remove(self.slots.pop(name))

    def merge(self, name: str) -> None:
        """Merges the adapter into the weights that it changes, and removes all slots."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        slot = self.slots[name]
        for module in list(self._model.modules()):
            for child_name, child in list(module.named_children()):
                if isinstance(child, BaseTunerLayer):
                    child.merge(safe_merge=True, adapter_names=[slot])
                    setattr(module, child_name, child.get_base_layer())
        self.slots.clear()
        self._active_name = None

    def activate(self, name: str) -> None:
        """Activates an adapter for the next forward passes; an empty name selects the base model."""
        if name == self._active_name:
            return
        if name and name not in self.slots:
            raise adapter_not_found(name, self.slots)
        for layer in self._layers():
            if name:
                layer.set_adapter(self.slots[name], inference_mode=True)
            # The layer's own method would make frozen weights trainable again.
            layer._disable_adapters = not name
        self._active_name = name

    def _remove(self, slot: str) -> None:
        for layer in self._layers():
            layer.delete_adapter(slot)
        getattr(self._model, "peft_config", {}).pop(slot, None)
        self._active_name = None

    def _layers(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]


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
