"""LoRA adapters inside vLLM: slots, and ids that are never reused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from stillhouse.protos.files.adapter import WEIGHTS
from stillhouse.teacher_service.engine import LoadedAdapter
from stillhouse.teacher_service.engines.vllm.adapter_validation import Shapes, check_weights
from stillhouse.teacher_service.engines.vllm.errors import first_line
from stillhouse.teacher_service.models.adapter_files import (
    adapter_invalid,
    adapter_not_found,
    check_config,
    check_matrices_only,
    require_slot,
)
from stillhouse.teacher_service.models.fingerprint import adapter_fingerprint


class VllmAdapters:
    """Adapters of one `AsyncLLM`, which is passed to `load` and `unload`.

    vLLM identifies adapters by number, and its prefix cache by name: both are new for every load, so that nothing
    cached for one adapter serves another.
    """

    def __init__(
        self, *, max_adapters: int, max_rank: int, shapes: Shapes, weight_files: Sequence[Path]
    ) -> None:
        """`shapes` are the `matrix_shapes` of the model in `weight_files`."""
        self._max_adapters = max_adapters
        self._max_rank = max_rank
        self._shapes = shapes
        self._weight_files = tuple(weight_files)
        self._numbers = count(1)
        self.requests: dict[str, Any] = {}
        """vLLM's `LoRARequest` of each loaded adapter by name, in the order of loading."""
        self._changing = asyncio.Lock()

    def request(self, name: str) -> Any:
        """vLLM's `LoRARequest` of a name; None for the base model. Raises `StillhouseError` (ADAPTER_NOT_FOUND)."""
        if not name:
            return None
        if name not in self.requests:
            raise adapter_not_found(name, self.requests)
        return self.requests[name]

    async def load(self, llm: Any, name: str, path: Path) -> LoadedAdapter:
        """Loads an adapter into a free slot. Raises `StillhouseError` (ADAPTER_SLOTS, ADAPTER_INVALID)."""
        from vllm.lora.request import LoRARequest

        async with self._changing:
            require_slot(self.requests, self._max_adapters)
            rank = await asyncio.to_thread(check_config, name, path, max_rank=self._max_rank)
            await asyncio.to_thread(check_matrices_only, name, path)
            await asyncio.to_thread(check_weights, name, path / WEIGHTS, self._shapes, self._weight_files)
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
                raise adapter_invalid(name, first_line(error)) from error
            if not accepted:
                raise adapter_invalid(name, "vLLM did not take it")
            self.requests[name] = request
            return LoadedAdapter(name=name, fingerprint=fingerprint, rank=rank, path=path)

    async def unload(self, llm: Any, name: str) -> None:
        """Frees the slot of an adapter that no request uses."""
        async with self._changing:
            request = self.request(name)
            del self.requests[name]
            await llm.remove_lora(request.lora_int_id)
