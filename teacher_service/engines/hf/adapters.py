"""LoRA adapters inside a transformers model: several are injected, at most one is active."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from stillhouse.protos.errors import Reason, StillhouseError


class LoraSlots:
    """Adapters of one model. Not thread-safe: called by the thread that owns the model."""

    def __init__(self, model: Any, *, max_adapters: int, max_rank: int) -> None:
        self._model = model
        self._max_adapters = max_adapters
        self._max_rank = max_rank
        # torch forbids dots in module names, so slots have names of their own.
        self._slots: dict[str, str] = {}
        self._count = 0
        self._active_name: str | None = None

    def load(self, name: str, path: Path) -> int:
        """Injects an adapter; returns its rank.

        Raises `StillhouseError` with ADAPTER_SLOTS or ADAPTER_INVALID; the model is then unchanged.
        """
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
        from safetensors.torch import load_file

        if len(self._slots) >= self._max_adapters:
            raise StillhouseError(
                Reason.ADAPTER_SLOTS,
                f"All {self._max_adapters} adapter slots are taken by {', '.join(self._slots) or 'nothing'}. "
                "Unload one, or start the teacher with a larger --max-adapters.",
            )
        rank = self._checked_rank(name, path)
        slot = f"slot{self._count}"
        self._count += 1
        try:
            lora = LoraConfig.from_pretrained(str(path))
            lora.inference_mode = True
            weights = _strip_prefix(load_file(path / "adapter_model.safetensors"))
            _require_finite(name, weights)
            with warnings.catch_warnings():  # several adapters in one model are intended here
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                inject_adapter_in_model(lora, self._model, adapter_name=slot)
            outcome = set_peft_model_state_dict(self._model, weights, adapter_name=slot)
            _require_fit(
                name, outcome.unexpected_keys, [key for key in outcome.missing_keys if f".{slot}" in key]
            )
        except StillhouseError:
            self._remove(slot)
            raise
        # Libraries raise any type on malformed files.
        except Exception as error:
            self._remove(slot)
            raise _invalid(name, _why(error)) from error
        self._model.eval()
        self._slots[name] = slot
        self._active_name = None
        return rank

    def unload(self, name: str) -> None:
        """Removes the adapter from the model."""
        self._remove(self._slots.pop(name))

    def merge(self, name: str) -> None:
        """Merges the adapter into the weights that it changes, and removes all slots."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        slot = self._slots[name]
        for module in list(self._model.modules()):
            for child_name, child in list(module.named_children()):
                if isinstance(child, BaseTunerLayer):
                    child.merge(safe_merge=True, adapter_names=[slot])
                    setattr(module, child_name, child.get_base_layer())
        self._slots.clear()
        self._active_name = None

    def activate(self, name: str) -> None:
        """Activates an adapter for the next forward passes; an empty name selects the base model."""
        if name == self._active_name:
            return
        if name and name not in self._slots:
            raise StillhouseError(
                Reason.ADAPTER_NOT_FOUND,
                f"There is no adapter {name!r}; loaded are: {', '.join(self._slots) or 'none'}.",
                resource=name,
            )
        for layer in self._layers():
            if name:
                layer.set_adapter(self._slots[name], inference_mode=True)
            # The layer's own method would make frozen weights trainable again.
            layer._disable_adapters = not name
        self._active_name = name

    def _checked_rank(self, name: str, path: Path) -> int:
        rank = int(_read_config(name, path)["r"])
        if rank > self._max_rank:
            raise _invalid(
                name, f"its rank is {rank}, and this teacher takes at most --max-lora-rank {self._max_rank}"
            )
        return rank

    def _remove(self, slot: str) -> None:
        for layer in self._layers():
            layer.delete_adapter(slot)
        configs = getattr(self._model, "peft_config", {})
        configs.pop(slot, None)
        self._active_name = None

    def _layers(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]


def _why(error: Exception) -> str:
    """First informative line of an exception; torch's for mismatched weights begins with a headline."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), type(error).__name__)


def _read_config(name: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise _invalid(name, f"its adapter_config.json cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else "no object"
        raise _invalid(name, f"its peft_type is {kind!r}, and only LORA is served")
    if config.get("modules_to_save"):
        raise _invalid(
            name, f"it replaces modules ({config['modules_to_save']}); train it without modules_to_save"
        )
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _invalid(name, f"its rank r is {rank!r}, which is not a positive integer")
    return config


def _strip_prefix(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames keys from peft's wrapper to the model itself."""
    return {key.removeprefix("base_model.model."): value for key, value in weights.items()}


def _require_fit(name: str, unexpected: list[str], missing: list[str]) -> None:
    if unexpected or missing:
        raise _invalid(
            name, f"its weights do not fit its configuration or the model: {(*unexpected, *missing)[:3]}"
        )


def _require_finite(name: str, weights: dict[str, torch.Tensor]) -> None:
    for key, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise _invalid(name, f"its weight {key} holds NaN or infinite values")


def _invalid(name: str, why: str) -> StillhouseError:
    return StillhouseError(
        Reason.ADAPTER_INVALID, f"Adapter {name!r} cannot be loaded: {why}.", resource=name
    )
