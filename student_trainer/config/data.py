"""Settings of a run's data: sources of rows, and their rendering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from stillhouse.protos.rows.row_forms import FORMATS
from stillhouse.student_trainer.config.fields import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    Choices,
    DefaultText,
    JsonText,
    Lines,
    MaxLength,
    Range,
    Required,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """One source of rows."""

    path: Annotated[str, Required("is required: a file on the trainer's host.")] = ""
    weight: Annotated[float | None, POSITIVE] = None
    limit: Annotated[int | None, COUNT] = None
    format: Annotated[str, Choices(*FORMATS)] = "auto"
    split: str = ""
    config: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The text to train and evaluate on."""

    train: Annotated[
        tuple[DatasetConfig, ...],
        Required(
            'is required: a list of datasets, such as [{path: "datasets/..."}].', unless_task="evaluate"
        ),
    ] = ()
    eval: tuple[DatasetConfig, ...] = ()
    eval_fraction: Annotated[float, Range(0, 1, open_high=True)] = 0.02
    max_sequence_tokens: Annotated[int, Range(2)] = 2048
    overflow: Annotated[str, Choices("truncate", "drop")] = "truncate"
    teacher_field: str = ""
    completion_only: bool = True
    packing: Annotated[
        bool | None, DefaultText("where it is cheaper; false with optimizer.micro_batch_size")
    ] = None
    seed: Annotated[int, NOT_NEGATIVE, DefaultText("optimizer.seed")] = 0
    chat: bool = False
    extra_fields: Annotated[str, Choices("keep", "refuse")] = "keep"
    end_text: bool = True
    date: Annotated[str, DefaultText("that of the cache, else the day of the run's creation, in UTC")] = ""
    chat_template: Annotated[str, Lines(), DefaultText("the tokenizer's")] = ""
    chat_template_kwargs: Annotated[str, JsonText("object")] = ""
    tools: Annotated[str, JsonText("array")] = ""
    classes: Annotated[
        tuple[str, ...],
        MaxLength(200),
        DefaultText("those of the student's model, else those of the teacher"),
    ] = ()
