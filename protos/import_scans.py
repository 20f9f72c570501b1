"""Keeps what transformers reads of an installation at its import: the names of all packages, and those of its models.

It reads thousands of files for them at every import, which takes a second. They are kept under the user's cache directory, beside
the names, sizes and modification times of what they were read from, and read again once one of those has changed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.files.user_cache import user_cache

_SCANNING = "transformers.utils.import_utils"
_METADATA = (".dist-info", ".egg-info", "egg-info")

T = TypeVar("T")

_Structure = dict[frozenset[str], dict[str, set[str]]]
"""Names of objects by the module that has them, by the libraries that the module needs."""


class _Scan(Protocol):
    """transformers' own function."""

    def __call__(self, module_path: str | Path, prefix: str | None = None) -> _Structure: ...


def keep_scans() -> None:
    """Makes the next import of transformers use what an earlier one has read. Has no effect once it is imported."""
    if _SCANNING not in sys.modules and not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the one module that reads."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _SCANNING:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or type(spec.loader) is not SourceFileLoader:
            return spec
        return spec_from_file_location(fullname, spec.origin, loader=_Loader(fullname, spec.origin))


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        read = importlib.metadata.packages_distributions
        importlib.metadata.packages_distributions = lambda: _distributions(read)
        try:
            super().exec_module(module)
        finally:
            importlib.metadata.packages_distributions = read
        scan: _Scan | None = getattr(module, "define_import_structure", None)
        models = Path(self.path).parents[1] / "models"
        if scan is not None and models.is_dir():
            vars(module)["define_import_structure"] = _kept_scan(scan, models, source=Path(self.path))


def _distributions(read: Callable[[], Mapping[str, list[str]]]) -> Mapping[str, list[str]]:
    """Names of distributions by package."""
    origins = [found for each in sys.path if (found := _metadata_in(each))]
    return _kept(
        "packages " + "\0".join(str(path) for path, _ in origins),
        origins,
        read=read,
        encode=lambda value: {name: list(each) for name, each in value.items()},
        decode=lambda value: {str(name): [str(each) for each in names] for name, names in value.items()},
    )


def _metadata_in(directory: str) -> tuple[str, list[tuple[str, int]]] | None:
    """A directory of sys.path with the descriptions of distributions in it, or an archive; None if it has none."""
    found = []
    with suppress(OSError):
        if Path(directory).is_file():
            found = [("", Path(directory).stat().st_mtime_ns)]
        else:
            with os.scandir(directory or ".") as entries:
                found = [
                    (each.name, each.stat(follow_symlinks=False).st_mtime_ns)
                    for each in entries
                    if each.name.lower().endswith(_METADATA)
                ]
    return (str(Path(directory).resolve()), sorted(found)) if found else None


def _kept_scan(scan: _Scan, models: Path, *, source: Path) -> _Scan:
    # All times are the same in some images of containers, whatever version they hold.
    version = getattr(sys.modules.get("transformers"), "__version__", "")
    try:
        state = source.stat()
        origins = [version, str(source), state.st_size, state.st_mtime_ns, _file_states(models)]
    except OSError:
        return scan

    def define_import_structure(module_path: str | Path, prefix: str | None = None) -> _Structure:
        if Path(module_path) not in (models, models / "__init__.py"):
            return scan(module_path, prefix)
        found = _kept(
            f"models {models}", origins, read=lambda: scan(module_path), encode=_listed, decode=_unlisted
        )
        if prefix is None:
            return found
        return {
            needed: {f"{prefix}.{module}": names for module, names in modules.items()}
            for needed, modules in found.items()
        }

    return define_import_structure


def _file_states(folder: str | Path) -> list[Any]:
    """Names, times and sizes of modules in and below a folder: an editor may write to a file that stays the same one."""
    states: list[Any] = []
    with os.scandir(folder) as entries:
        for each in entries:
            if each.name.endswith(".py"):
                state = each.stat()
                states.append((each.name, state.st_mtime_ns, state.st_size))
            elif each.name != "__pycache__" and each.is_dir():
                states.append((each.name, _file_states(each.path)))
    return sorted(states)


def _listed(structure: _Structure) -> list[Any]:
    return [
        [sorted(needed), {module: sorted(names) for module, names in modules.items()}]
        for needed, modules in structure.items()
    ]


def _unlisted(value: list[Any]) -> _Structure:
    return {
        frozenset(needed): {module: set(names) for module, names in modules.items()}
        for needed, modules in value
    }


def _kept(
    what: str,
    origins: list[Any],
    *,
    read: Callable[[], T],
    encode: Callable[[T], Any],
    decode: Callable[[Any], T],
) -> T:
    """The value that was read from the same origins before; else reads it, and keeps it."""
    path = user_cache("scans") / f"{sha256(what.encode()).hexdigest()[:16]}.json"
    origin = sha256(json.dumps([sys.version, origins]).encode()).hexdigest()
    # Missing, or damaged.
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        kept = json.loads(path.read_bytes())
        if kept["origin"] == origin:
            return decode(kept["value"])
    value = read()
    with suppress(
        OSError, ValueError, TypeError, AttributeError
    ):  # a home that takes nothing costs time, nothing else
        content = json.dumps({"origin": origin, "value": encode(value)})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content.encode())
    return value
