"""The configuration of a run's student and the memory of this host, for estimates; no weights are opened."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from stillhouse.protos.errors import FieldViolation, Reason, StillhouseError, first_line
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.telemetry.gpus import list_gpus
from stillhouse.protos.telemetry.host_memory import memory_bytes
from stillhouse.student_trainer.config import proto
from stillhouse.student_trainer.config.checks import invalid_field, invalid_spec
from stillhouse.student_trainer.runs.api.hub_lookup import CONFIG, TIMEOUT_S, hub_problems
from stillhouse.student_trainer.runs.api.spec_resolution import Host, resolve_rendering

MAX_CONFIG_BYTES = 4 * 2**20


async def inspect_student(request: pb.InspectStudentRequest, host: Host) -> pb.InspectStudentResponse:
    """Returns config.json of a model, and this host's memory.

    Raises StillhouseError: INVALID_SPEC for a model that no run could name, MODEL_NOT_FOUND if its configuration cannot be read.
    """
    return await asyncio.to_thread(_inspected, request, host)


def _inspected(request: pb.InspectStudentRequest, host: Host) -> pb.InspectStudentResponse:
    spec = pb.RunSpec(student=pb.StudentSpec(model=request.model, revision=request.revision))
    if not request.model:
        raise invalid_field(
            "model", "it is required; give a Hugging Face id, or a path on the trainer's host."
        )
    found = resolve_rendering(proto.with_defaults(spec), host)
    problems = [*found.problems, *hub_problems(found.hub_ids)]
    if problems:
        raise invalid_spec([_named(each) for each in problems])
    offered = set(host.slots.gpus)
    return pb.InspectStudentResponse(
        config_json=_config(found.config.student.model, request.revision),
        host_memory_bytes=memory_bytes() or 0,
        gpu_memory_bytes=[each.total_bytes for each in list_gpus() if each.index in offered]
        if offered
        else [],
    )


def _named(problem: FieldViolation) -> FieldViolation:
    return replace(problem, field=problem.field.removeprefix("student."))


def _config(model: str, revision: str) -> str:
    path = Path(model) / CONFIG if Path(model).is_absolute() else _from_hub(model, revision)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise _not_found(model, f"it is larger than {MAX_CONFIG_BYTES} bytes")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _not_found(model, first_line(error)) from error


def _from_hub(name: str, revision: str) -> Path:
    """The file in this host's cache, which it is loaded into if it is not there."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, CONFIG, revision=revision or None, etag_timeout=TIMEOUT_S))
    except Exception as error:  # of its HTTP library, which differs by version
        raise _not_found(name, first_line(error)) from error


def _not_found(model: str, why: str) -> StillhouseError:
    return StillhouseError(
        Reason.MODEL_NOT_FOUND,
        f"{CONFIG} of {model} cannot be read on the trainer's host ({why}). Correct the path or the id, or download the model there.",
        resource=model,
    )
