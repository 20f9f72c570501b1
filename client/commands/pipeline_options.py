"""Compares the options of a pipeline's commands with those that the commands have, before any of them runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from stillhouse.client.pipeline.definition import Pipeline, Stage
    from stillhouse.client.runfile.source_map import Problem

FILES = "files"
"""Name in a stage of a command's arguments."""


def option_problems(pipeline: Pipeline, context: click.Context) -> Iterator[Problem]:
    """Yields the problems of all stages that are a command of the client; `context` is that of any of its commands."""
    from stillhouse.client.pipeline.definition import COMMAND_KINDS

    seen = set()
    for stage in pipeline.stages:
        if (
            stage.kind in COMMAND_KINDS and stage.name not in seen
        ):  # one of those for each value stands for all
            seen.add(stage.name)
            yield from _problems(stage, _command(COMMAND_KINDS[stage.kind], context))


def _command(words: tuple[str, ...], context: click.Context) -> click.Command:
    command = context.find_root().command
    for word in words:
        assert isinstance(command, click.Group)
        found = command.get_command(context, word)
        assert found is not None, words
        command = found
    return command


def _problems(stage: Stage, command: click.Command) -> Iterator[Problem]:
    options = {name.lstrip("-"): each for each in command.params for name in each.opts if name[0] == "-"}
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    given = set()
    for key, _ in stage.value.value:
        if key.tag.endswith(":merge"):
            return  # its names are elsewhere
        name = str(key.value).replace("_", "-")
        given.add(name)
        if name == FILES and not arguments:
            yield _problem(
                stage, key, f"stands for arguments, which {stage.kind} does not take; {_listed(options)}"
            )
        elif name != FILES and name not in options:
            near = difflib.get_close_matches(name, options, 1)
            remedy = f'did you mean "{near[0].replace("-", "_")}"?' if near else _listed(options)
            yield _problem(stage, key, f"there is no such option of {stage.kind}; {remedy}")
    for each in command.params:
        names = [FILES] if isinstance(each, click.Argument) else [name.lstrip("-") for name in each.opts]
        if each.required and given.isdisjoint(names):
            yield _problem(stage, None, f"{stage.kind} needs {names[-1].replace('-', '_')}.")


def _listed(options: dict[str, Any]) -> str:
    shown = sorted(
        name.replace("-", "_") for name, each in options.items() if not each.hidden and len(name) > 1
    )
    return f"its options are: {', '.join(shown)}."


def _problem(stage: Stage, key: Any, sentence: str) -> Problem:
    from stillhouse.client.runfile.source_map import Problem, SourceLocation

    if key is None:
        return Problem(location=stage.location, path=f"stage {stage.name}", sentence=sentence)
    mark = key.start_mark
    location = SourceLocation(source=stage.location.source, line=mark.line + 1, column=mark.column + 1)
    return Problem(location=location, path=str(key.value)[:80], sentence=sentence)
