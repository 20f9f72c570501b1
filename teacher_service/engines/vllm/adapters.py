"""LoRA adapters inside vLLM: slots, and ids that are never reused."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.engine import LoadedAdapter
from stillhouse.teacher_service.engines.vllm.adapter_validation import AdapterRules, invalid
from stillhouse.teacher_service.engines.vllm.errors import first_line
from stillhouse.teacher_service.models.fingerprint import adapter_fingerprint


class VllmAdapters:
    """Adapters of one `AsyncLLM`, which is passed to `load` and `unload`.

    vLLM identifies adapters by number, and its prefix cache by name: both are new for every load, so that nothing
    cached for one adapter serves another.
    """

    def __init__(self, *, max_adapters: int, rules: AdapterRules) -> None:
        self._max_adapters = max_adapters
        self._rules = rules
        self._numbers = count(1)
        self._loaded: dict[str, tuple[LoadedAdapter, Any]] = {}
        self._changing = asyncio.Lock()

    def all(self) -> tuple[LoadedAdapter, ...]:
        """The loaded adapters, in the order of loading."""
        return tuple(adapter for adapter, _ in self._loaded.values())

    def request(self, name: str) -> Any:
        """vLLM's `LoRARequest` of a name; None for the base model. Raises `StillhouseError` (ADAPTER_NOT_FOUND)."""
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
            rank = await asyncio.to_thread(self._rules.check, name, path)
            directory = str(await asyncio.to_thread(path.resolve))
            fingerprint = await asyncio.to_thread(adapter_fingerprint, path)
            number = next(self._numbers)
            request = LoRARequest(
                lora_name=f"{number}:{fingerprint}", lora_int_id=number, lora_path=directory
            )
            try:
                accepted = await llm.add_lora(request)
            except Exception as error:  # any error of vLLM's worker on these files
                await llm.check_health()
                raise invalid(name, first_line(error)) from error
            if not accepted:
                raise invalid(name, "vLLM did not take it")
            adapter = LoadedAdapter(name=name, fingerprint=fingerprint, rank=rank, path=path)
            self._loaded[name] = (adapter, request)
            return adapter

    async def unload(self, llm: Any, name: str) -> None:
        """Frees the slot of an adapter that no request uses."""
        async with self._changing:
            request = self.request(name)
            del self._loaded[name]
            await llm.remove_lora(request.lora_int_id)
