"""Settings that decide how rows become examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.student_trainer.config.rules.teacher_prompt import prompt_fields
from stillhouse.student_trainer.config.schema import DataConfig
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.train.data.encoding import RowEncoder


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleSettings:
    """The part of a run's settings that its processes for encoding need; they get it pickled."""

    data: DataConfig
    teachers: tuple[str, ...] = ()
    """Names that rows may give."""
    prompted: tuple[TeacherConfig, ...] = ()
    """Teachers, some of which may see a prompt of their own."""

    @classmethod
    def make(cls, data: DataConfig, teachers: Sequence[TeacherConfig]) -> ExampleSettings:
        """The settings of a run with `teachers`."""
        return cls(data=data, teachers=tuple(each.name for each in teachers), prompted=tuple(teachers))

    def make_encoder(self, tokenizer: Any) -> RowEncoder:
        """Makes an encoder of rows. Raises StillhouseError(TOKENIZER_INVALID)."""
        prompts = [each.prompt for each in self.prompted if each.prompt is not None]
        fields = set[str]().union(*(prompt_fields(each) for each in prompts))
        return RowEncoder.of(self.data, tokenizer, own_fields=fields)
