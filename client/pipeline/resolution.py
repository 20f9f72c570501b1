"""Resolves the references of one stage to paths and runs, and names what it does by a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stillhouse.client.core.errors import usage_error
from stillhouse.client.pipeline.content import content_hash
from stillhouse.client.pipeline.definition import COMMAND_KINDS, Pipeline, Stage
from stillhouse.client.pipeline.references import Reference, substituted
from stillhouse.client.pipeline.state import PipelineState
from stillhouse.client.runfile.load import RunFile
from stillhouse.client.trainer.trainer import local_datasets
from stillhouse.protos.rows.reading.source import files_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A stage whose references have values."""

    stage: Stage
    value: yaml.Node
    run_file: Path | None
    inputs: Mapping[str, Path]
    """Files and folders that it reads, by a name for errors."""
    outputs: Mapping[str, Path]
    """Files and folders that it makes, by name."""

    def plain_value(self) -> Any:
        """The value in Python's types."""
        # The safe loader's constructor; composing is done, so no text is read.
        return yaml.SafeLoader("").construct_document(self.value)


def resolved(pipeline: Pipeline, stage: Stage, state: PipelineState) -> Resolved:
    """`stage` with values for its references; the stages that it names have ended."""
    inputs = {f"inputs.{name}": pipeline.directory / path for name, path in stage.inputs.items()}
    outputs = {name: pipeline.work / path for name, path in stage.outputs.items()}

    def values(reference: Reference) -> Sequence[str]:
        if not reference.stage:
            return [stage.variables[reference.name]]
        if reference.stage == "inputs":
            return [str(inputs[f"inputs.{reference.name}"])]
        if reference.stage == "outputs":
            return [str(outputs[reference.name])]
        found = []
        for other in _named(pipeline, stage, reference):
            if reference.name in other.outputs:
                path = pipeline.work / other.outputs[reference.name]
                inputs[f"{other.id}.{reference.name}"] = path
                found.append(str(path))
            else:
                run = state.record(other.id).run
                found.append(run if reference.name == "run" else f"runs/{run}/final")
        return found

    try:
        value = substituted(stage.value, values)
    except ValueError as error:
        raise usage_error(f"{stage.location}: stage {stage.id}: {error}") from error
    return Resolved(
        stage=stage,
        value=value,
        run_file=pipeline.directory / stage.run_file if stage.run_file else None,
        inputs=inputs,
        outputs=outputs,
    )


def _named(pipeline: Pipeline, stage: Stage, reference: Reference) -> Sequence[Stage]:
    """The stages of a reference: of one value, of the value that `stage` stands for, or of all."""
    found = pipeline.named(reference.stage)
    if reference.key:
        return [each for each in found if each.key == reference.key]
    if stage.variables and found[0].variables.keys() == stage.variables.keys():
        return [each for each in found if each.key == stage.key]
    return found


def argv(resolution: Resolved) -> list[str]:
    """The command line of a stage that is no run, without the program's name for commands of the client."""
    value = resolution.plain_value()
    if resolution.stage.kind == "command":
        return [_word(resolution.stage, each) for each in value]
    words = list(COMMAND_KINDS[resolution.stage.kind])
    positional: list[str] = []
    for name, given in value.items():
        items = given if isinstance(given, list) else [given]
        if name == "files":
            positional += [_word(resolution.stage, each) for each in items]
            continue
        flag = f"--{str(name).replace('_', '-')}" if len(str(name)) > 1 else f"-{name}"
        for item in items:
            if item is True:
                words.append(flag)
            elif item is not False and item is not None:
                # One word, so that a value that begins with a dash is no option.
                word = _word(resolution.stage, item)
                words += [f"{flag}={word}"] if flag.startswith("--") else [flag, word]
    return [*words, *(["--", *positional] if positional else [])]


def _word(stage: Stage, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise usage_error(
        f"{stage.location}: stage {stage.id}: a command takes text and numbers; {str(value)[:80]} is neither."
    )


def fingerprint(resolution: Resolved, run: RunFile | None) -> str:
    """SHA-256 of what the stage does and of the content of what it reads; `run` is that of a run stage.

    Raises StillhouseError for an input that is missing.
    """
    stage = resolution.stage
    digest = hashlib.sha256()
    value = resolution.plain_value()
    outputs = {name: str(path) for name, path in stage.outputs.items()}
    digest.update(json.dumps([stage.kind, value, outputs], sort_keys=True, default=str).encode())
    for name, path in sorted(resolution.inputs.items()):
        if not path.exists():
            raise usage_error(
                f"{stage.location}: stage {stage.id} reads {path} ({name}), which does not exist."
            )
        digest.update(f"{name} {content_hash(path)}".encode())
    if resolution.run_file is not None:
        digest.update(content_hash(resolution.run_file).encode())
    if run is not None:
        digest.update(run.spec.SerializeToString(deterministic=True))
        for _, local in local_datasets(run):
            for path in files_of(local):
                digest.update(content_hash(path).encode())
    return digest.hexdigest()
