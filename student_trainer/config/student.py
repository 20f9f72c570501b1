"""Settings of the model that is trained, and of its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from stillhouse.student_trainer.config.fields import (
    NOT_NEGATIVE,
    POSITIVE,
    Choices,
    DefaultText,
    Range,
    Required,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """A low-rank adapter."""

    rank: Annotated[int, Range(1, 1024)] = 16
    alpha: Annotated[float, POSITIVE] = 32.0
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    target_modules: tuple[str, ...] = ()
    layers: Annotated[tuple[int, ...], NOT_NEGATIVE] = ()
    bias: Annotated[str, Choices("none", "all", "lora_only")] = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """The model that is trained."""

    model: Annotated[str, Required("is required: a Hugging Face id or a path on the trainer's host.")] = ""
    lora: LoraConfig | None = None
    quantization: Annotated[str, Choices("none", "int8", "nf4")] = "none"
    gradient_checkpointing: bool = False
    from_config: bool = False
    revision: str = ""
    adapter: str = ""
    keep_layers: Annotated[tuple[int, ...], NOT_NEGATIVE] = ()
    output: Annotated[
        str, Choices("adapter", "merged", "both"), DefaultText("both with an adapter, else merged")
    ] = "merged"

    @property
    def trains_adapter(self) -> bool:
        """True if the base is frozen and an adapter is trained."""
        return self.lora is not None or bool(self.adapter)
