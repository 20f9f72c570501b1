"""LoRA adapters inside vLLM: who has which slot, and ids that are never given twice."""

from __future__ import annotations

import asyncio
import json
from itertools import count
from pathlib import Path
from typing import Any

from protos.errors import Reason, StillhouseError
from teacher_service.engine import LoadedAdapter
from teacher_service.fingerprint import adapter_fingerprint
from teacher_service.vllm_errors import first_line


class VllmAdapters:
    """The adapters of one `AsyncLLM`, which `load` and `unload` are given.

    vLLM tells adapters apart by a number, and its cache of computed prefixes by a name: both are made anew for every
    load, so that nothing computed for one adapter can serve another.
    """

    def __init__(self, *, max_adapters: int, max_rank: int) -> None:
        self._max_adapters = max_adapters
        self._max_rank = max_rank
        self._numbers = count(1)
        self._loaded: dict[str, tuple[LoadedAdapter, Any]] = {}
        self._changing = asyncio.Lock()

    def all(self) -> tuple[LoadedAdapter, ...]:
        """The loaded adapters, in the order of loading."""
        return tuple(adapter for adapter, _ in self._loaded.values())

    def request(self, name: str) -> Any:
        """vLLM's `LoRARequest` for a name, None for the base model. Raises `StillhouseError` (ADAPTER_NOT_FOUND)."""
        if not name:
            return None
        if name not in self._loaded:
            raise StillhouseError(
                Reason.ADAPTER_NOT_FOUND,
                f"There is no adapter {name!r}; loaded are: {', '.join(self._loaded) or 'none'}.",
                resource=name,
            )
        return self._loaded[name][1]

    async def load(self, llm: Any, name: str, path: Path) -> LoadedAdapter:
        """Loads an adapter into a free slot. Raises `StillhouseError` (ADAPTER_SLOTS, ADAPTER_INVALID)."""
        from vllm.lora.request import LoRARequest

        async with self._changing:
            if len(self._loaded) >= self._max_adapters:
                raise StillhouseError(
                    Reason.ADAPTER_SLOTS,
                    f"All {self._max_adapters} adapter slots are taken by {', '.join(self._loaded) or 'nothing'}. "
                    "Unload one, or start the teacher with a larger --max-adapters.",
                )
            rank = await asyncio.to_thread(self._check, name, path)
            directory = str(await asyncio.to_thread(path.resolve))
            fingerprint = await asyncio.to_thread(adapter_fingerprint, path)
            number = next(self._numbers)
            request = LoRARequest(
                lora_name=f"{number}:{fingerprint}", lora_int_id=number, lora_path=directory
            )
            try:
                accepted = await llm.add_lora(request)
            except Exception as error:  # whatever vLLM's worker makes of the files
                await llm.check_health()
                raise _invalid(name, first_line(error)) from error
            if not accepted:
                raise _invalid(name, "vLLM did not take it")
            adapter = LoadedAdapter(name=name, fingerprint=fingerprint, rank=rank, path=path)
            self._loaded[name] = (adapter, request)
            return adapter

    async def unload(self, llm: Any, name: str) -> None:
        """Frees the slot of an adapter that no request uses."""
        async with self._changing:
            request = self.request(name)
            del self._loaded[name]
            await llm.remove_lora(request.lora_int_id)

    def _check(self, name: str, path: Path) -> int:
        """The rank of an adapter whose files are what they say."""
        try:
            config = json.loads((path / "adapter_config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise _invalid(name, f"its adapter_config.json cannot be read ({first_line(error)})") from error
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            kind = config.get("peft_type") if isinstance(config, dict) else "no object"
            raise _invalid(name, f"its peft_type is {kind!r}, and only LORA is served")
        patterns = config.get("rank_pattern") or {}
        ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
        for rank in ranks:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise _invalid(name, f"its rank r is {rank!r}, which is no positive number")
            if rank > self._max_rank:
                raise _invalid(
                    name,
                    f"its rank is {rank}, and this teacher takes at most --max-lora-rank {self._max_rank}",
                )
        _require_finite_weights(name, path / "adapter_model.safetensors")
        return max(rank for rank in ranks if isinstance(rank, int))


def _require_finite_weights(name: str, path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - it is no mapping
                if not bool(weights.get_tensor(key).isfinite().all()):
                    raise _invalid(name, f"its weight {key} holds values that are not finite numbers")
    except (OSError, SafetensorError) as error:
        raise _invalid(name, f"its adapter_model.safetensors cannot be read ({first_line(error)})") from error


def _invalid(name: str, why: str) -> StillhouseError:
    return StillhouseError(
        Reason.ADAPTER_INVALID, f"Adapter {name!r} cannot be loaded: {why.rstrip('.')}.", resource=name
    )
