"""Quantised models in vLLM: names and types that go together; which methods a platform has, vLLM itself says."""

from __future__ import annotations

from pathlib import Path

from teacher_service.config import TeacherConfig
from teacher_service.model_files import is_quantised

_SAME = {"bitsandbytes_4bit": "bitsandbytes"}
"""What the reference engine and vLLM call by two names: vLLM quantises to 4 bits while it loads."""


def method_argument(asked: str) -> str:
    """The method as vLLM names it."""
    return _SAME.get(asked.lower().replace("-", "_"), asked)


def dtype_argument(config: TeacherConfig, directory: Path, *, on_cpu: bool) -> str:
    """The type of the computation. On a CPU "auto" is float32, but for quantised models, few of which compute in it."""
    if config.dtype == "auto" and on_cpu and not config.quantization and not is_quantised(directory):
        return "float32"
    return config.dtype
