"""The base that lies beside an adapter, as runs on cut and new models write it: the adapter is served on no other."""

from __future__ import annotations

from pathlib import Path

from stillhouse.protos.files.adapter import base_beside
from stillhouse.teacher_service.models.adapter_files import adapter_invalid
from stillhouse.teacher_service.models.fingerprint import file_sha256, weight_files


def check_base(name: str, adapter: Path, model: Path) -> None:
    """Returns if the model in `model` is the base beside the adapter, or a copy of it, or if there is none beside.

    Raises `StillhouseError` (ADAPTER_INVALID): on another model of the same shapes the adapter would compute nonsense.
    """
    base = base_beside(adapter)
    if base is None or base.resolve() == model.resolve() or _weights(base) == _weights(model):
        return
    raise adapter_invalid(
        name, f"its base is the model in {base}, and {model} has other weights; give {base} as --model"
    )


def _weights(directory: Path) -> list[str]:
    return [file_sha256(path) for path in weight_files(directory)]
