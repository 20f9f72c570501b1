"""`stillhouse estimate`: predicts a run's memory before it is submitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stillhouse.client.terminal.finite_float import FiniteFloat
from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.runfile.load import RunFile
    from stillhouse.protos.telemetry.gpus import Gpu

_PATH = click.Path(path_type=Path)
_DTYPE_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "nf4": 0.56,
    "int4": 0.56,
}
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
@click.option(
    "--teacher-apart",
    is_flag=True,
    help="The teacher has a device of its own.  [default: where its targets are other hosts, or this one has more GPUs]",
)
@click.option("--device", type=click.Choice(["cpu", "gpu"]), help="[default: gpu if this machine has one]")
@click.option("--memory-gib", type=FiniteFloat(min=0, min_open=True), help="[default: this machine's]")
def estimate(
    session: Session,
    *,
    file: Path,
    overrides: tuple[str, ...],
    student_model: Path | None,
    teacher_model: Path | None,
    teacher_dtype: str,
    teacher_apart: bool,
    device: str | None,
    memory_gib: float | None,
) -> int:
    """Predict the memory of the run in FILE, from shapes alone; the exit code is 1 if it cannot fit.

    What shares a device is summed: the training processes on a CPU, and a teacher beside them. No weights are opened.
    """
    from stillhouse.client.estimate.memory import (
        MemoryPlan,
        is_beside_trainer,
        num_sharing,
        remedies,
        student_bytes,
        teacher_bytes,
    )
    from stillhouse.client.estimate.model_shape import ModelShape
    from stillhouse.client.runfile.load import load_run_file
    from stillhouse.client.runfile.values import check_values
    from stillhouse.client.terminal.render import columns, size_text
    from stillhouse.protos.telemetry.gpus import list_gpus

    run = load_run_file(file, overrides)
    check_values(run)
    found = list_gpus()
    device = device or ("gpu" if found else "cpu")
    limit = round(memory_gib * GIB) if memory_gib else _memory(device, found)
    source = _student(run, student_model)
    shape, plan = ModelShape.read(source), MemoryPlan.from_spec(run.spec, device)
    parts: dict[str, dict[str, int]] = {"student": student_bytes(shape, plan)}
    if teacher_model is not None:
        parts["teacher"] = teacher_bytes(
            ModelShape.read(teacher_model),
            dtype_bytes=_DTYPE_BYTES[teacher_dtype],
            sequence_tokens=plan.sequence_tokens,
        )
    totals = {name: sum(each.values()) for name, each in parts.items()}
    copies = num_sharing(run.spec, device)
    has_own = device == "gpu" and memory_gib is None and len(found) > 1
    is_beside = "teacher" in totals and not (teacher_apart or has_own) and is_beside_trainer(run.spec)
    together = copies * totals["student"] + (totals["teacher"] if is_beside else 0)
    fits = {name: total <= limit for name, total in totals.items()}
    all_fit = all(fits.values()) and together <= limit
    helps = [] if all_fit else list(remedies(shape, plan))
    others = together - copies * totals["student"]
    if session.as_json:
        document: dict[str, Any] = {
            "device": device,
            "memory_bytes": limit,
            "parameters": shape.parameters,
            "remedies": [{"set": text, "student_bytes": then} for text, then in helps],
            "together": {"students": copies, "teacher": is_beside, "total_bytes": together},
            "fits": all_fit,
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
        if copies > 1 or is_beside:
            what = f"{copies} training processes" if copies > 1 else "student"
            what += " and teacher on one device" if is_beside else " on one device"
            session.say(f"{what}: {size_text(together)} of {size_text(limit)}")
            if together > limit:
                session.say(f"  They cannot fit: {size_text(together - limit)} too much.")
            elif is_beside and device == "gpu":
                share = math.floor(100 * (1 - copies * totals["student"] / limit)) / 100
                session.say(
                    f"  vLLM takes 0.9 of a GPU by default: start the teacher with --gpu-memory-utilization {share:g} at most."
                )
        for text, then in helps:
            fitting = ", which fits" if copies * then + others <= limit else ""
            session.say(f"  {text} would take {size_text(then)}{fitting}")
    return 0 if all_fit else EXIT_IMPOSSIBLE


def _student(run: RunFile, named: Path | None) -> Path:
    """The directory or config.json of the student: as named, or student.model from here or beside the run file."""
    from stillhouse.client.core.errors import usage_error

    source = named or Path(run.spec.student.model)
    if source.exists() or named is not None:
        return source
    beside = run.directory / source
    if not beside.exists():
        raise usage_error(
            f"{source} is not on this machine; give its directory or config.json as --student-model."
        )
    return beside


def _memory(device: str, found: Sequence[Gpu]) -> int:
    """Bytes of this machine, or of its largest GPU."""
    from stillhouse.client.core.errors import usage_error
    from stillhouse.client.estimate.memory import memory_bytes

    limit = memory_bytes() if device == "cpu" else max((each.total_bytes for each in found), default=None)
    if limit is None:
        raise usage_error("this machine's memory is unknown; give --memory-gib.")
    return limit
