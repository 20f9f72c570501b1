"""Checks of the prompts that teachers alone see: their parts, their templates and what they cannot go with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta, nodes

from stillhouse.protos.errors import FieldViolation
from stillhouse.protos.rows.conversation import parse_options
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.tokenizers.bounded_templates import BoundedEnvironment
from stillhouse.student_trainer.config.rules.cross_tokenizer import is_bridged
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.config.teacher import TeacherPromptConfig

ENVIRONMENT = BoundedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
ROW_PROMPT, ROW_COMPLETION = "row_prompt", "row_completion"
"""Variables of the templates that every row has."""
_ROLES = ("system", "developer", "user", "assistant", "tool")


def check_teacher_prompts(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of `teachers[].prompt`."""
    for number, teacher in enumerate(config.teachers):
        if teacher.prompt is not None:
            path = f"teachers[{number}].prompt"
            yield from _check_parts(teacher.prompt, path)
            yield from _check_templates(teacher.prompt, path)
            yield from _check_run(config, path)


def prompt_templates(prompt: TeacherPromptConfig) -> Mapping[str, str]:
    """The templates of a prompt by their place in it."""
    parts = {"system": prompt.system, "template": prompt.template}
    contents = {f"messages[{at}].content": each.content for at, each in enumerate(prompt.messages)}
    return {name: text for name, text in {**parts, **contents}.items() if text}


def prompt_fields(prompt: TeacherPromptConfig) -> set[str]:
    """The fields of rows that a prompt reads. Raises jinja2.TemplateError."""
    names = {prompt.messages_field} if prompt.messages_field else set()
    for text in prompt_templates(prompt).values():
        names |= meta.find_undeclared_variables(ENVIRONMENT.parse(text))
    return names - {ROW_PROMPT, ROW_COMPLETION}


def template_options(prompt: TeacherPromptConfig) -> Mapping[str, Any]:
    """The variables that a prompt gives the chat template. Raises FieldError."""
    return parse_options(prompt.chat_template_kwargs)


def _check_parts(prompt: TeacherPromptConfig, path: str) -> Iterator[FieldViolation]:
    turns = [name for name in ("template", "messages", "messages_field") if getattr(prompt, name)]
    if len(turns) > 1:
        yield FieldViolation(f"{path}.{turns[1]}", f"is set beside {turns[0]}; give one of them.")
    if prompt.system and (prompt.messages or prompt.messages_field):
        yield FieldViolation(
            f"{path}.system", f"is set beside {turns[0]}, the complete prompt; put it there as a message."
        )
    if not (turns or prompt.system or prompt.chat_template_kwargs):
        yield FieldViolation(
            path, "says nothing; give system, template, messages, messages_field or chat_template_kwargs."
        )
    for at, message in enumerate(prompt.messages):
        if message.role and message.role not in _ROLES:
            yield FieldViolation(
                f"{path}.messages[{at}].role", f'is "{message.role}"; it must be one of {", ".join(_ROLES)}.'
            )
    if prompt.messages and prompt.messages[-1].role == "assistant":
        yield FieldViolation(
            f"{path}.messages[{len(prompt.messages) - 1}].role",
            'is "assistant", but the completion that is scored is the assistant\'s. End with a turn of the user.',
        )


def _check_templates(prompt: TeacherPromptConfig, path: str) -> Iterator[FieldViolation]:
    for place, text in prompt_templates(prompt).items():
        try:
            tree = ENVIRONMENT.parse(text)
        except (TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            yield FieldViolation(
                f"{path}.{place}",
                f"is no Jinja template{f', line {line}' if line else ''}: {str(error).rstrip('.')}. Correct it; text with {{{{ or {{% goes "
                "between {% raw %} and {% endraw %}.",
            )
            continue
        for problem in _unusable(tree):
            yield FieldViolation(f"{path}.{place}", problem)
    try:
        template_options(prompt)
    except FieldError as error:
        yield FieldViolation(f"{path}.{error.field}", error.problem)


def _unusable(tree: nodes.Template) -> Iterator[str]:
    for each in tree.find_all((nodes.Filter, nodes.Test)):
        known = ENVIRONMENT.filters if isinstance(each, nodes.Filter) else ENVIRONMENT.tests
        if each.name not in known:
            yield f'line {each.lineno} uses "{each.name}", which Jinja does not have. Correct its name.'
    for other in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        yield f"line {other.lineno} reads another template, and there is none. Write its text here."


def _check_run(config: RunConfig, path: str) -> Iterator[FieldViolation]:
    if not config.data.completion_only:
        yield FieldViolation(
            path,
            "needs data.completion_only: true: the student's own prompt has no place behind another one.",
        )
    if is_bridged(config):
        yield FieldViolation(
            path,
            "needs a teacher with the student's tokens; with loss.foreign_tokenizer: alm both read one text. Leave one out.",
        )
