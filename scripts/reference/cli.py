"""docs/reference/cli.md, from the click commands of the three programs."""

import inspect
from collections.abc import Iterator

import click

from scripts.reference.markdown import NOTE, table
from stillhouse.client.cli import cli
from stillhouse.student_trainer.runs.__main__ import main as trainer
from stillhouse.teacher_service.__main__ import MERGE, merge_adapter, serve

PROGRAMS = {
    "stillhouse": cli,
    "stillhouse-teacher": serve,
    f"stillhouse-teacher {MERGE}": merge_adapter,
    "stillhouse-trainer": trainer,
}


def page() -> str:
    """The page."""
    parts = [
        f"{NOTE}\n# Command line\n\nAn option of `stillhouse-teacher` and `stillhouse-trainer` may also be set in the environment, "
        "in capitals after the program's name: `STILLHOUSE_TRAINER_CPU_SLOTS`.\n"
    ]
    for name, command in PROGRAMS.items():
        parts += _command(command, click.Context(command, info_name=name, **command.context_settings), 2)
    return "".join(parts)


def _command(command: click.Command, ctx: click.Context, level: int) -> Iterator[str]:
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    yield f"\n{'#' * min(level, 4)} {ctx.command_path}\n\n```\n{usage}\n```\n\n{_text(command.help)}\n"
    records = [(each, each.get_help_record(ctx)) for each in command.params]
    rows = [(f"`{record[0]}`", _help(option, record[1])) for option, record in records if record]
    if rows:
        yield "\n" + table(("Option", "Meaning"), rows)
    if command.epilog:
        yield f"\n{_text(command.epilog)}\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            assert below is not None
            yield from _command(below, click.Context(below, info_name=name, parent=ctx), level + 1)


def _help(option: click.Parameter, text: str) -> str:
    words = option.type.choices if isinstance(option.type, click.Choice) else ()
    return (
        text if all(str(word) in text for word in words) else f"{text} One of: {', '.join(map(str, words))}."
    )


def _text(text: str | None) -> str:
    """Help as Markdown: a paragraph after \\b keeps its lines."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(
        f"```\n{each.removeprefix(chr(8)).strip(chr(10))}\n```" if each.startswith("\b") else each
        for each in paragraphs
    )
