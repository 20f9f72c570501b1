"""A run's teachers as frozen dataclasses: services, and prompts that a teacher alone sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from stillhouse.student_trainer.config.fields import (
    POSITIVE,
    Choices,
    DefaultText,
    JsonText,
    Lines,
    MaxLength,
    Range,
    Required,
)

MAX_PROMPT_CHARACTERS = 1 << 16
_NAME = MaxLength(200)
_PROSE = MaxLength(MAX_PROMPT_CHARACTERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherMessageConfig:
    """One message of a teacher's own prompt."""

    role: Annotated[str, _NAME, Required("is required, such as user.")] = ""
    content: Annotated[str, Lines(), _PROSE] = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherPromptConfig:
    """A prompt that a teacher alone sees."""

    system: Annotated[str, Lines(), _PROSE] = ""
    template: Annotated[str, Lines(), _PROSE] = ""
    messages: tuple[TeacherMessageConfig, ...] = ()
    messages_field: Annotated[str, _NAME] = ""
    chat_template_kwargs: Annotated[str, JsonText("object"), _PROSE] = ""
    max_sequence_tokens: Annotated[int | None, Range(2), DefaultText("that of the teacher")] = None

    @property
    def writes_turns(self) -> bool:
        """True if it replaces the turns before the completion, and not their system message alone."""
        return bool(self.template or self.messages or self.messages_field)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """One teacher service, or one adapter of it."""

    name: Annotated[str, _NAME] = ""
    targets: Annotated[
        tuple[str, ...],
        Required('is required, such as ["127.0.0.1:7401"].', unless_offline=True),
    ] = ()
    adapter: str = ""
    weight: Annotated[float, POSITIVE] = 1.0
    credential: str = ""
    tls_server_name: str = ""
    logprob_dtype: Annotated[str, Choices("float16", "float32", "compact")] = "float16"
    prefetch_steps: Annotated[int, Range(1, 64)] = 2
    prompt: TeacherPromptConfig | None = None
