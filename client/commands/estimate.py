"""`stillhouse estimate`: predicts a run's memory before it is submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stillhouse.client.terminal.session import Session, command

_PATH = click.Path(path_type=Path)
_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.56}
EXIT_IMPOSSIBLE = 1
GIB = 2**30


@command()
@click.argument("file", type=_PATH)
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Change a field of FILE.")
@click.option(
    "--student-model", type=_PATH, help="Directory or config.json.  [default: student.model, on this machine]"
)
@click.option(
    "--teacher-model", type=_PATH, help="Directory or config.json of the teacher, to estimate it too."
)
@click.option("--teacher-dtype", type=click.Choice(list(_DTYPE_BYTES)), default="bfloat16", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "gpu"]), help="[default: gpu if this machine has one]")
@click.option("--memory-gib", type=click.FloatRange(min=0, min_open=True), help="[default: this machine's]")
def estimate(
    session: Session,
    *,
    file: Path,
    overrides: tuple[str, ...],
    student_model: Path | None,
    teacher_model: Path | None,
    teacher_dtype: str,
    device: str | None,
    memory_gib: float | None,
) -> int:
    """Predict the memory of the run in FILE, from shapes alone; the exit code is 1 if it cannot fit.

    Student and teacher are estimated separately, as if each had the device to itself. No weights are opened.
    """
    from stillhouse.client.core.errors import usage_error
    from stillhouse.client.estimate.memory import (
        MemoryPlan,
        memory_bytes,
        remedies,
        student_bytes,
        teacher_bytes,
    )
    from stillhouse.client.estimate.model_shape import ModelShape
    from stillhouse.client.runfile.load import load_run_file
    from stillhouse.client.terminal.render import columns, size_text
    from stillhouse.protos.telemetry.gpus import list_gpus

    run = load_run_file(file, overrides)
    found = list_gpus()
    device = device or ("gpu" if found else "cpu")
    limit = round(memory_gib * GIB) if memory_gib else None
    if limit is None:
        limit = memory_bytes() if device == "cpu" else max((each.total_bytes for each in found), default=None)
    if limit is None:
        raise usage_error("this machine's memory is unknown; give --memory-gib.")
    source = student_model or Path(run.spec.student.model)
    if not source.exists() and student_model is None:
        beside = run.directory / source
        if not beside.exists():
            raise usage_error(
                f"{source} is not on this machine; give its directory or config.json as --student-model."
            )
        source = beside
    shape, plan = ModelShape.read(source), MemoryPlan.from_spec(run.spec, device)
    parts: dict[str, dict[str, int]] = {"student": student_bytes(shape, plan)}
    if teacher_model is not None:
        parts["teacher"] = teacher_bytes(
            ModelShape.read(teacher_model),
            dtype_bytes=_DTYPE_BYTES[teacher_dtype],
            sequence_tokens=plan.sequence_tokens,
        )
    totals = {name: sum(each.values()) for name, each in parts.items()}
    fits = {name: total <= limit for name, total in totals.items()}
    helps = [] if fits["student"] else list(remedies(shape, plan))
    if session.as_json:
        document: dict[str, Any] = {
            "device": device,
            "memory_bytes": limit,
            "parameters": shape.parameters,
            "remedies": [{"set": text, "student_bytes": then} for text, then in helps],
        }
        for name, each in parts.items():
            document[name] = {"total_bytes": totals[name], "fits": fits[name], "parts_bytes": each}
        session.emit(document)
    else:
        for name, each in parts.items():
            session.say(f"{name} ({device}): {size_text(totals[name])} of {size_text(limit)}")
            session.say(columns((f"  {part}", size_text(number)) for part, number in each.items()))
            if not fits[name]:
                session.say(f"  It cannot fit: {size_text(totals[name] - limit)} too much.")
        for text, then in helps:
            session.say(f"  {text} would take {size_text(then)}{'' if then > limit else ', which fits'}")
    return 0 if all(fits.values()) else EXIT_IMPOSSIBLE
