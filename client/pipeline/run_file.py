"""The run of a stage: its own fields over the run file that it names; errors keep their lines."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.client.pipeline.definition import Pipeline
from stillhouse.client.pipeline.resolution import Resolved, argv, resolved
from stillhouse.client.pipeline.state import PipelineState
from stillhouse.client.runfile.load import RunFile, load_run_file
from stillhouse.client.runfile.source_map import Problem, invalid
from stillhouse.client.runfile.yaml_reader import RunFileReader
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec


def stage_run(resolution: Resolved, pipeline: Pipeline) -> RunFile:
    """The run of a resolved stage. Lists of the stage replace those of its run file, other fields are merged.

    Raises StillhouseError(INVALID_SPEC) with every problem.
    """
    stage = resolution.stage
    reader = RunFileReader(str(pipeline.path))
    reader.source_map.root = reader.location(stage.value)
    spec, directory = RunSpec(), pipeline.directory
    reader.read_message(resolution.value, spec, "")
    if reader.problems:
        raise invalid(reader.problems)
    if resolution.run_file is not None:
        base = load_run_file(resolution.run_file)
        spec, directory = _merged(base.spec, spec), base.directory
    if spec.HasField("task") and spec.task != stage.kind:
        sentence = (
            f'is "{spec.task}" in a stage "{stage.kind}"; remove it, or name the stage\'s work {spec.task}.'
        )
        raise invalid([Problem(location=stage.location, path="task", sentence=sentence)])
    spec.task = stage.kind
    spec.display_name = spec.display_name or f"{pipeline.name}: {stage.id}"
    return RunFile(spec=spec, source_map=reader.source_map, directory=directory)


def check_stages(pipeline: Pipeline) -> None:
    """Reads the command line or the run of each stage before any runs, with empty ids for the runs of earlier stages.

    Raises StillhouseError with the problems of the first stage that has some.
    """
    state = PipelineState(pipeline.work, pipeline.path)
    for stage in pipeline.stages:
        resolution = resolved(pipeline, stage, state)
        file = resolution.run_file
        if not stage.is_run:
            argv(resolution)
        elif file is None or file.exists() or not file.is_relative_to(pipeline.work):
            stage_run(resolution, pipeline)  # a run file in the work folder may be made by an earlier stage


def missing_inputs(pipeline: Pipeline) -> Iterator[Problem]:
    """Yields the inputs of stages, which no stage makes, that do not exist."""
    for stage in pipeline.stages:
        for name, path in stage.inputs.items():
            if not (pipeline.directory / path).exists():
                sentence = (
                    f"reads {pipeline.directory / path}, which does not exist. Make it; if a stage makes it, declare it among "
                    "that stage's outputs, and write ${STAGE.NAME} where it is read."
                )
                yield Problem(
                    location=stage.location, path=f"stage {stage.id}: inputs.{name}", sentence=sentence
                )


def _merged(base: RunSpec, over: RunSpec) -> RunSpec:
    """`base` with the fields that `over` sets, to any depth; a list that `over` has replaces that of `base`."""
    _clear_lists(base, over)
    base.MergeFrom(over)
    return base


def _clear_lists(base: object, over: object) -> None:
    for field, value in over.ListFields():  # type: ignore[attr-defined]
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if field.is_repeated and not is_map:
            base.ClearField(field.name)  # type: ignore[attr-defined]
        elif field.message_type is not None and not field.is_repeated:
            _clear_lists(getattr(base, field.name), value)
