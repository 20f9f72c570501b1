"""Encodes the prompts that teachers alone see, out of the fields of rows; a prompt that has no exact place is refused.

The learnt tokens stay those of the student: they are never encoded again behind another prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Template, TemplateError, UndefinedError

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.conversation import Message, Turns, parse_turns
from stillhouse.protos.rows.field_error import FieldError, require_unicode
from stillhouse.protos.rows.files import row_error
from stillhouse.protos.tokenizers.bounded_rendering import bounded_rendering, checked_length
from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.config.rules.teacher_prompt import (
    ENVIRONMENT,
    ROW_COMPLETION,
    ROW_PROMPT,
    prompt_templates,
    template_options,
)
from stillhouse.student_trainer.config.teacher import TeacherConfig, TeacherPromptConfig
from stillhouse.student_trainer.train.data.chat.template import Conversation
from stillhouse.student_trainer.train.data.encoding import RowEncoder
from stillhouse.student_trainer.train.data.readers import DatasetRow
from stillhouse.student_trainer.train.data.teacher_prompt import TeacherPrompt

_SYSTEM = ("system", "developer")


class TeacherPromptEncoder:
    """Encodes the prompts of all teachers of a run that have one of their own."""

    def __init__(self, teachers: Sequence[TeacherConfig], encoder: RowEncoder) -> None:
        """`encoder` is that of the student's rows. Raises StillhouseError(INVALID_SPEC) for a template that Jinja refuses."""
        self._encoders = {
            each.name: _PromptEncoder(each.prompt, f"teachers[{number}].prompt", encoder)
            for number, each in enumerate(teachers)
            if each.prompt is not None
        }

    def __bool__(self) -> bool:
        return bool(self._encoders)

    def encode(
        self, row: DatasetRow, token_ids: Sequence[int], completion_mask: Sequence[bool], teacher: str
    ) -> dict[str, TeacherPrompt]:
        """Returns the prompts of the teachers that a row asks, by name; `teacher` is the one that it names, if any.

        `token_ids` and `completion_mask` are the student's, not truncated. Raises StillhouseError(DATASET_INVALID).
        """
        if True not in completion_mask:
            return {}
        return {
            name: each.encode(row, token_ids, completion_mask)
            for name, each in self._encoders.items()
            if teacher in ("", name)
        }

    def room(self, prompts: Mapping[str, TeacherPrompt]) -> int | None:
        """Returns the student's tokens of a row whose teachers' sequences keep their limits; None without a limit."""
        rooms = [
            limit - prompt.shift
            for name, prompt in prompts.items()
            if (limit := self._encoders[name].max_sequence_tokens) is not None
        ]
        return min(rooms, default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _PromptRow(DatasetRow):
    """A row whose errors name a teacher's prompt instead of the row's own."""

    place: str
    """Place of the prompt in the run file."""

    def invalid(self, field: str, problem: str) -> StillhouseError:
        return row_error(self.path, self.number, f"{self.place} ({field})", problem)


class _Place(NamedTuple):
    """The place of the first completion in a conversation."""

    at: int
    """Index of its message."""
    text: str
    """The conversation before it, with the generation prompt."""
    opening: list[int]
    """Tokens of the generation prompt that the data's turns begin with themselves, such as of a thought."""


class _PromptEncoder:
    """Encodes one teacher's prompt."""

    def __init__(self, config: TeacherPromptConfig, path: str, encoder: RowEncoder) -> None:
        self._config = config
        self._path = path
        self._encoder = encoder
        self._templates = {
            name: _compiled(text, f"{path}.{name}") for name, text in prompt_templates(config).items()
        }
        self._options = template_options(config)
        self.max_sequence_tokens = config.max_sequence_tokens

    def encode(
        self, row: DatasetRow, token_ids: Sequence[int], completion_mask: Sequence[bool]
    ) -> TeacherPrompt:
        """Returns the prompt of a row that has a completion. Raises StillhouseError(DATASET_INVALID)."""
        content = self._encoder.parse(row)
        if content.turns is not None:
            ids = self._encode_turns(row, content.turns, token_ids, completion_mask)
        elif content.kind == "completion":
            ids = self._encode_plain(row, content.prompt, content.completion, token_ids, completion_mask)
        else:
            raise row.invalid(
                self._path,
                "has no place in a row of text, which has no prompt. Give messages, or prompt and completion.",
            )
        if not ids:
            raise row.invalid(
                self._path, "is empty for this row; a teacher needs at least one token before a completion."
            )
        return TeacherPrompt(np.asarray(ids, np.int32), completion_mask.index(True))

    def _encode_plain(
        self,
        row: DatasetRow,
        prompt: str,
        completion: str,
        token_ids: Sequence[int],
        completion_mask: Sequence[bool],
    ) -> list[int]:
        config = self._config
        if config.system or config.messages or config.messages_field or self._options:
            raise row.invalid(
                self._path,
                "makes turns, and this row has plain text. Set data.chat: true, give messages, or use template alone.",
            )
        text = self._render("template", row, {ROW_PROMPT: prompt, ROW_COMPLETION: completion})
        encoder, own = self._encoder.text_encoder, list(token_ids[completion_mask.index(True) :])
        whole = encoder.encode(text + completion, special=True, cuts=[len(text)])
        mask = whole.mask([(len(text), len(text) + len(completion))]).tolist()
        begin = mask.index(True) if True in mask else len(mask)
        rest = whole.token_ids[begin:]
        # As the student's row is encoded, where this leaves the learnt tokens as they are.
        if text and rest[: len(own)] == own[: len(rest)]:
            return whole.token_ids[:begin]
        return encoder.encode(text, special=True).token_ids

    def _encode_turns(
        self, row: DatasetRow, turns: Turns, token_ids: Sequence[int], completion_mask: Sequence[bool]
    ) -> list[int]:
        own = self._encoder.chat_template.conversation(row, turns)
        place = self._find(own, token_ids[: completion_mask.index(True)])
        if place is None:
            raise row.invalid(
                self._path,
                "has no exact place: the student's chat template does not begin the first learnt turn behind its generation "
                "prompt. Give prompt and completion, or a chat template that does.",
            )
        messages = self._messages(row, own, turns, place.at)
        theirs = self._conversation(row, turns, messages)
        text = self._encoder.chat_template.render(theirs, generation_prompt=True).text
        if _num_runs(completion_mask) > 1:
            self._check_later_turns(own, turns, place, messages, text)
        ids = self._encode_text(text)
        opening = place.opening
        if opening and ids[-len(opening) :] != opening:
            raise row.invalid(
                self._path,
                "changes the generation prompt, with a part of which the learnt turns begin. Leave chat_template_kwargs out.",
            )
        return ids[: len(ids) - len(opening)]

    def _encode_text(self, text: str) -> list[int]:
        return self._encoder.text_encoder.encode(text, special=False).token_ids

    def _find(self, own: Conversation, before: Sequence[int]) -> _Place | None:
        """Returns the place of the first learnt turn, whose prompt the student reads as the tokens `before`."""
        learnt = [index for index, is_learnt in enumerate(own.trained) if is_learnt and index]
        for index in learnt:
            try:
                text = self._encoder.chat_template.render(own.first(index), generation_prompt=True).text
            except StillhouseError:
                continue
            ids = self._encode_text(text)
            opening = ids[len(before) :]
            if ids[: len(before)] == list(before) and (not opening or index == learnt[0]):
                return _Place(index, text, opening)
        return None

    def _conversation(self, row: DatasetRow, turns: Turns, messages: Sequence[Message]) -> Conversation:
        place = _PromptRow(path=row.path, number=row.number, values=row.values, place=self._path)
        options = {**turns.options, **self._options}
        changed = replace(turns, messages=tuple(messages), options=options, trained=())
        return self._encoder.chat_template.conversation(place, changed)

    def _messages(self, row: DatasetRow, own: Conversation, turns: Turns, index: int) -> list[Message]:
        """Returns the turns that the teacher sees before the completion in message `index`."""
        before = list(turns.messages[:index])
        users = [at for at, each in enumerate(before) if each["role"] == "user"]
        variables = {
            ROW_PROMPT: before[users[-1]]["content"] or "" if users else "",
            ROW_COMPLETION: own.messages[index].get("content") or "",
        }
        config = self._config
        if config.messages_field:
            return self._messages_of_row(row)
        if config.messages:
            return [
                {"role": each.role, "content": self._render(f"messages[{at}].content", row, variables)}
                for at, each in enumerate(config.messages)
            ]
        if config.template:
            if not users:
                raise row.invalid(
                    f"{self._path}.template",
                    "replaces the user's turn, and none is before the completion. Use messages.",
                )
            text = self._render("template", row, variables)
            before[users[-1]] = {**before[users[-1]], "content": text}
        if config.system:
            system = {"role": "system", "content": self._render("system", row, variables)}
            has_system = bool(before) and before[0]["role"] in _SYSTEM
            before = [system, *before[has_system:]]
        return before

    def _messages_of_row(self, row: DatasetRow) -> list[Message]:
        name = self._config.messages_field
        try:
            messages = parse_turns(row.values.get(name), name=name).messages
        except FieldError as error:
            raise row.invalid(f"{self._path}.messages_field, {error.field}", error.problem) from error
        if messages[-1]["role"] == "assistant":
            raise row.invalid(
                f"{self._path}.messages_field, {name}[{len(messages) - 1}]",
                "is a turn of the assistant, which the completion itself is. Remove it.",
            )
        return list(messages)

    def _check_later_turns(
        self, own: Conversation, turns: Turns, place: _Place, messages: Sequence[Message], text: str
    ) -> None:
        """Returns if all that follows the first completion is the same behind the teacher's prompt. Raises DATASET_INVALID."""
        row = own.row
        if self._config.writes_turns:
            raise row.invalid(
                self._path,
                "writes the turn before one completion, and this row has several. Give one per row, leave the others out with "
                "weight: 0, or set system alone.",
            )
        template = self._encoder.chat_template
        ours = template.render(own).text
        theirs = template.render(
            self._conversation(row, turns, [*messages, *turns.messages[place.at :]])
        ).text
        is_prefix = ours.startswith(place.text) and theirs.startswith(text)
        if not is_prefix or place.opening or ours[len(place.text) :] != theirs[len(text) :]:
            raise row.invalid(
                self._path,
                "changes the turns behind the first completion, as the student's chat template writes them. Give one completion "
                "per row, or leave the others out with weight: 0.",
            )

    def _render(self, name: str, row: DatasetRow, variables: Mapping[str, str]) -> str:
        """Renders a template over the fields of a row. Raises StillhouseError(DATASET_INVALID)."""
        template = self._templates.get(name)
        if template is None:
            return ""
        fields: dict[str, Any] = {key: value for key, value in row.values.items() if value is not None}
        try:
            with bounded_rendering():
                text = template.render({**variables, **fields})
            return require_unicode(checked_length(text), name)
        except UndefinedError as error:
            raise row.invalid(
                f"{self._path}.{name}",
                f"cannot be rendered: {_said(error)}. Give the row this field, or test it in the template with `is defined`.",
            ) from error
        except Exception as error:  # a template is a program that may raise anything
            raise row.invalid(
                f"{self._path}.{name}",
                f"cannot be rendered: {_said(error)}. Correct the template, or the row.",
            ) from error


def _compiled(text: str, path: str) -> Template:
    try:
        return ENVIRONMENT.from_string(text)
    except (TemplateError, RecursionError) as error:
        raise invalid_field(path, f"is no Jinja template: {_said(error)}. Correct it.") from error


def _said(error: Exception) -> str:
    return str(error).rstrip(".")


def _num_runs(mask: Sequence[bool]) -> int:
    """Returns the number of runs of True."""
    return int(mask[0]) + sum(not before and here for before, here in pairwise(mask))
