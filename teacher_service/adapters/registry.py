"""Adapters by name: a name never changes its weights, and an adapter in use is not unloaded."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.adapter import FILES, base_beside
from stillhouse.teacher_service.engine import Engine, LoadedAdapter
from stillhouse.teacher_service.models.adapter_base import check_base
from stillhouse.teacher_service.models.adapter_files import MAX_NAME_CHARS, adapter_not_found, check_ranks
from stillhouse.teacher_service.models.files import locate_model
from stillhouse.teacher_service.models.fingerprint import adapter_fingerprint

Result = TypeVar("Result")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
MAX_NAMES = 1 << 16
"""Names that a process remembers, about 20 MB."""


class AdapterRegistry:
    """Every adapter name since the start of the process, and the adapters loaded now."""

    def __init__(self, engine: Engine, roots: tuple[Path, ...]) -> None:
        self._engine = engine
        self._roots = tuple(root.resolve() for root in roots)
        self._loaded: dict[str, LoadedAdapter] = {}
        self._fingerprints: dict[str, str] = {}
        self._leaving: dict[str, asyncio.Event] = {}
        self._users: Counter[str] = Counter()
        self._one_at_a_time = asyncio.Lock()
        self._changing: set[asyncio.Task[Any]] = set()

    def adapters(self) -> tuple[LoadedAdapter, ...]:
        """The adapters that requests can name."""
        return tuple(adapter for name, adapter in self._loaded.items() if name not in self._leaving)

    def adopt(self, adapters: Iterable[LoadedAdapter]) -> None:
        """Takes in adapters that the engine has from the start; those with names that no request can use are left out."""
        for adapter in adapters:
            if len(adapter.name) <= MAX_NAME_CHARS and NAME.fullmatch(adapter.name):
                self._loaded[adapter.name] = adapter
                self._fingerprints[adapter.name] = adapter.fingerprint

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[LoadedAdapter | None]:
        """Pins an adapter while a request uses it; None for the base model, whose name is empty.

        Raises `StillhouseError` with ADAPTER_NOT_FOUND.
        """
        if not name:
            yield None
            return
        adapter = self._loaded.get(name)
        if adapter is None or name in self._leaving:
            raise adapter_not_found(name, [each.name for each in self.adapters()])
        self._users[name] += 1
        try:
            yield adapter
        finally:
            self._users[name] -= 1
            if self._users[name] == 0 and name in self._leaving:
                self._leaving[name].set()

    async def load(self, name: str, path: str, *, trusted: bool = False) -> LoadedAdapter:
        """Loads a directory under a name; loading the same content again succeeds.

        `trusted` paths come from the operator and may lie anywhere. Raises `StillhouseError`: INVALID_REQUEST for the
        name, PATH_NOT_ALLOWED, ADAPTER_INVALID, ADAPTER_CONFLICT, ADAPTER_SLOTS.
        """
        _check_name(name)
        directory = await asyncio.to_thread(self._directory, name, path, trusted)
        digest = await asyncio.to_thread(adapter_fingerprint, directory)
        async with self._one_at_a_time:
            known = self._fingerprints.get(name)
            if known is not None and known != digest:
                raise StillhouseError(
                    Reason.ADAPTER_CONFLICT,
                    f"Adapter {name!r} has been loaded with other weights ({known[:12]}, not {digest[:12]}), and a name "
                    "never changes its weights. Load these under another name, such as one with the training step in it.",
                    metadata={"loaded": known, "asked": digest},
                    resource=name,
                )
            if name in self._loaded:
                return self._loaded[name]
            if known is None and len(self._fingerprints) >= MAX_NAMES:
                raise StillhouseError(
                    Reason.ADAPTER_SLOTS,
                    f"This process has seen {MAX_NAMES} adapter names. Restart the teacher.",
                )
            return await self._whole(self._take_in(name, directory, digest))

    async def unload(self, name: str) -> None:
        """Unloads an adapter once its requests have ended; new requests do not find it.

        Raises `StillhouseError` with ADAPTER_NOT_FOUND.
        """
        async with self._one_at_a_time:
            if name not in self._loaded:
                raise adapter_not_found(name, [each.name for each in self.adapters()])
            unused = self._leaving[name] = asyncio.Event()
            try:
                if self._users[name]:
                    await unused.wait()
                await self._whole(self._let_go(name))
            finally:
                del self._leaving[name]

    async def _take_in(self, name: str, directory: Path, digest: str) -> LoadedAdapter:
        await asyncio.to_thread(self._check, name, directory)
        adapter = await self._engine.load_adapter(name, directory)
        if adapter.fingerprint != digest:
            await self._engine.unload_adapter(name)
            raise StillhouseError(
                Reason.ADAPTER_CONFLICT,
                f"The files of adapter {name!r} changed while they were loaded. Write an adapter completely, then load it.",
                resource=name,
            )
        self._loaded[name] = adapter
        self._fingerprints[name] = digest
        return adapter

    async def _let_go(self, name: str) -> None:
        await self._engine.unload_adapter(name)
        del self._loaded[name]
        del self._users[name]

    async def _whole(self, change: Coroutine[Any, Any, Result]) -> Result:
        """Completes a change of the engine, even if the caller is cancelled."""
        task = asyncio.create_task(change)
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.gather(task, return_exceptions=True)
            raise

    def _check(self, name: str, directory: Path) -> None:
        check_ranks(name, directory)
        base = base_beside(directory)
        if base is not None and base.resolve().is_relative_to(directory):
            info = self._engine.info
            check_base(name, directory, locate_model(info.model, info.revision).directory)

    def _directory(self, name: str, path: str, trusted: bool) -> Path:
        """Resolves a path. The root is checked after links are followed."""
        roots = (Path("/"),) if trusted else self._roots

        def is_inside(path: Path) -> bool:
            return any(path.is_relative_to(root) for root in roots)

        try:
            directory = (Path(path).expanduser() if trusted else Path(path)).resolve()
            allowed = is_inside(directory)
            files = ((directory / file).resolve() for file in FILES)
            if allowed and all(file.is_file() and is_inside(file) for file in files):
                return directory
        except (OSError, ValueError, RuntimeError) as error:
            raise StillhouseError(
                Reason.ADAPTER_INVALID,
                f"The path of adapter {name!r} cannot be read: {error}.",
                resource=name,
            ) from error
        if not allowed:
            known = ", ".join(map(str, self._roots)) or "none"
            raise StillhouseError(
                Reason.PATH_NOT_ALLOWED,
                f"{path} lies outside the directories that this teacher may read ({known}). "
                "Start the teacher with --allow-root for it.",
            )
        raise StillhouseError(
            Reason.ADAPTER_INVALID,
            f"{path} is not an adapter: a LoRA adapter is a directory with {' and '.join(FILES)}.",
            resource=name,
        )


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME_CHARS or not NAME.fullmatch(name):
        raise StillhouseError(
            Reason.INVALID_REQUEST,
            f"{name[:MAX_NAME_CHARS]!r} is not a valid adapter name. Use at most {MAX_NAME_CHARS} letters, digits, dots, "
            "dashes and underscores, in parts joined by slashes, such as run-7/120.",
        )
