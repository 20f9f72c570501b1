"""Fingerprints of models and adapters: SHA-256 over everything that determines the logits, independent of the host."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.files.user_cache import user_cache

# Keys of configurations that tell a file's origin or author, not its computation.
_ORIGIN_KEYS = frozenset(
    {
        "_name_or_path",
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "transformers_version",
    }
)
# A file changed this recently can change again without a new time stamp.
_SETTLED_AFTER_S = 2.0
_HASHING_THREADS = 4
_MAX_CONFIG_BYTES = 16 << 20


def model_fingerprint(directory: Path, *, dtype: str, quantization: str) -> str:
    """Hex SHA-256 over configuration, compute type, quantisation and the SHA-256 of every weight file.

    Raises `StillhouseError` (MODEL_NOT_FOUND) where `directory` has no config.json or no weights.
    """
    return _digest(
        {
            "config": _configuration(directory / "config.json", Reason.MODEL_NOT_FOUND),
            "dtype": dtype,
            "quantization": quantization,
            "weights": _hash_files(weight_files(directory)),
        }
    )


def adapter_fingerprint(directory: Path) -> str:
    """Hex SHA-256 over an adapter's configuration and weights, independent of its directory.

    Raises `StillhouseError` (ADAPTER_INVALID) where one of the two files is missing or unreadable.
    """
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file():
        raise StillhouseError(
            Reason.ADAPTER_INVALID,
            f"{directory} has no adapter_model.safetensors. Save the adapter with safe_serialization=True; "
            "pickled weights are not read.",
        )
    return _digest(
        {
            "config": _configuration(directory / "adapter_config.json", Reason.ADAPTER_INVALID),
            "weights": _hash_files([weights]),
        }
    )


def weight_files(directory: Path) -> list[Path]:
    """Lists the model's weight files by name: safetensors, or PyTorch's own format where there are none.

    Raises `StillhouseError` (MODEL_NOT_FOUND) where there are neither.
    """
    for pattern in ("*.safetensors", "*.bin"):
        found = sorted(path for path in directory.glob(pattern) if not path.name.startswith("adapter_"))
        if found:
            return found
    raise StillhouseError(
        Reason.MODEL_NOT_FOUND,
        f"{directory} holds no weights: no *.safetensors and no *.bin file. Give a complete model directory.",
    )


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, cached by path, size and modification time under the user's cache directory."""
    status = path.stat()
    key = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    cached = cache_directory() / hashlib.sha256(key.encode()).hexdigest()
    with suppress(OSError, ValueError):
        value = cached.read_text()
        if len(bytes.fromhex(value)) == hashlib.sha256().digest_size:
            return value
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - status.st_mtime > _SETTLED_AFTER_S:
        with suppress(OSError):  # an unwritable home costs time, nothing else
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cached, value.encode())
    return value


def cache_directory() -> Path:
    """Directory of cached digests of weight files."""
    return user_cache("sha256")


def _hash_files(paths: Iterable[Path]) -> list[tuple[str, str]]:
    files = list(paths)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return list(zip((path.name for path in files), pool.map(file_sha256, files), strict=True))


def _configuration(path: Path, reason: Reason) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise StillhouseError(
                reason, f"{path} is larger than {_MAX_CONFIG_BYTES} bytes: it is not a configuration."
            )
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise StillhouseError(
            reason, f"{path} cannot be read ({error.strerror}). Name a directory that has it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise StillhouseError(reason, f"{path} is not JSON. Save it again.") from error
    if not isinstance(config, dict):
        raise StillhouseError(reason, f"{path} is not a JSON object. Save it again.")
    return {key: value for key, value in config.items() if key not in _ORIGIN_KEYS}


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
