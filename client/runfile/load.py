"""Reads a run file, YAML or JSON, into a RunSpec; every problem is reported at once, as FILE:LINE:COLUMN: path: sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stillhouse.client.core.errors import file_errors
from stillhouse.client.runfile.overrides import apply_override
from stillhouse.client.runfile.source_map import Problem, SourceLocation, SourceMap, invalid
from stillhouse.client.runfile.task_form import translated
from stillhouse.client.runfile.yaml_reader import RunFileReader
from stillhouse.protos.rows.conversation import is_json_list
from stillhouse.protos.rows.named_templates import is_file_name, read_setting
from stillhouse.protos.stillhouse.v1.run_pb2 import DataSpec, RunSpec

MAX_RUN_FILE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFile:
    """A run file as it was written."""

    spec: RunSpec
    """Its values, with overrides applied."""
    source_map: SourceMap
    """Source location of each field."""
    directory: Path
    """The file's directory; relative datasets are looked up there."""
    problems: tuple[Problem, ...] = ()
    """Parts that could not be read, which `spec` lacks."""


def load_run_file(path: Path | str, overrides: Sequence[str] = ()) -> RunFile:
    """The run in the file at `path`, or on standard input for "-", with `overrides` such as "loss.top_k=32".

    Raises StillhouseError(INVALID_SPEC) with every problem, one a line.
    """
    return _readable(read_run_file(path, overrides))


def read_run_file(path: Path | str, overrides: Sequence[str] = ()) -> RunFile:
    """As load_run_file, but problems of single fields are kept beside the rest of the run."""
    if str(path) == "-":
        return read_run(sys.stdin.buffer.read(MAX_RUN_FILE_BYTES + 1), "<stdin>", overrides)
    path = Path(path)
    with file_errors("read", path), path.open("rb") as file:
        content = file.read(MAX_RUN_FILE_BYTES + 1)
    return read_run(content, str(path), overrides, directory=path.parent)


def parse_run(
    content: bytes, source: str, overrides: Sequence[str] = (), *, directory: Path | None = None
) -> RunFile:
    """The run in `content`, which errors call `source`; without one they name fields alone."""
    return _readable(read_run(content, source, overrides, directory=directory))


def _readable(file: RunFile) -> RunFile:
    if file.problems:
        raise invalid(file.problems)
    return file


def read_run(
    content: bytes,
    source: str,
    overrides: Sequence[str] = (),
    *,
    directory: Path | None = None,
    reads_files: bool = True,
) -> RunFile:
    """As parse_run, but problems of single fields are kept beside the rest of the run.

    With `reads_files` false no file of this machine is opened, for text from the network.

    Raises StillhouseError(INVALID_SPEC) if nothing of it can be read.
    """
    reader = RunFileReader(source)
    spec = RunSpec()
    root = reader.compose(_decoded(content, source))
    if root is not None:
        root = translated(root)
        reader.source_map.root = reader.location(root)
        reader.read_message(root, spec, "")
    for override in overrides:
        apply_override(override, spec, reader)
    if any(not each.path for each in reader.problems):
        raise invalid(reader.problems)
    directory = directory or Path.cwd()
    if reads_files:
        _inline(spec.data, "chat_template", is_file_name, directory, reader)
        _inline(spec.data, "tools", lambda text: not is_json_list(text), directory, reader)
    return RunFile(
        spec=spec,
        source_map=reader.source_map,
        directory=directory,
        problems=tuple(reader.problems),
    )


def _inline(
    data: DataSpec, field: str, is_file: Callable[[str], bool], directory: Path, reader: RunFileReader
) -> None:
    """Puts the text of a small file beside the run file in the place of its name; other names are the trainer's."""
    name = getattr(data, field)
    if not is_file(name) or not (directory / name).is_file():
        return
    path = f"data.{field}"
    try:
        setattr(data, field, read_setting(directory / name))
    except (OSError, ValueError) as error:
        location = reader.source_map.find(path)[0]
        reader.problems.append(
            Problem(location=location, path=path, sentence=f"{name} cannot be read ({error}).")
        )


def parse_fields(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunFile:
    """The run in `values`, which has the field names of a run file; errors name fields alone, without lines."""
    text = yaml.safe_dump(dict(values), allow_unicode=True, sort_keys=False)
    return parse_run(text.encode(), "", overrides)


def _decoded(content: bytes, source: str) -> str:
    top = SourceLocation(source=source, line=1, column=1)
    if len(content) > MAX_RUN_FILE_BYTES:
        sentence = f"the file is larger than {MAX_RUN_FILE_BYTES} bytes; a run file is a page of text."
        raise invalid([Problem(location=top, path="", sentence=sentence)])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].split(b"\n")
        location = SourceLocation(source=source, line=len(before), column=len(before[-1]) + 1)
        sentence = "this byte is not UTF-8; save the file as UTF-8."
        raise invalid([Problem(location=location, path="", sentence=sentence)]) from error
    # JSON indents with tabs and has none inside its strings; YAML does not take them.
    return text.replace("\t", " ") if source.endswith(".json") else text
