"""The run of a stage: its own fields over the run file that it names; errors keep their lines."""

from __future__ import annotations

from stillhouse.client.pipeline.definition import Pipeline
from stillhouse.client.pipeline.resolution import Resolved
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
