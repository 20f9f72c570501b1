"""`stillhouse estimate`: predicts a run's memory before it is submitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillhouse.client.terminal.finite_float import FiniteFloat
from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.estimate.forecast import Forecast
    from stillhouse.client.estimate.model_shape import ModelShape
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
    "--student-model",
    type=_PATH,
    help="Directory or config.json.  [default: student.model, on this machine or the trainer's]",
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

    What shares a device is summed: the training processes on a CPU, and a teacher beside them. No weights are opened. For a
    student that is not on this machine the trainer tells its shapes, and the memory of its own devices.
    """
    from stillhouse.client.estimate.forecast import Teacher, forecast
    from stillhouse.client.estimate.model_shape import ModelShape
    from stillhouse.client.runfile.load import load_run_file
    from stillhouse.client.runfile.values import check_values
    from stillhouse.protos.telemetry.gpus import list_gpus

    run = load_run_file(file, overrides)
    check_values(run)
    source = _student(run, student_model)
    if source is None:
        shape, memory = _asked(session, run)
    else:
        shape, memory = ModelShape.read(source), _memory_here(list_gpus())
    device = device or ("gpu" if memory.gpus else "cpu")
    limit = round(memory_gib * GIB) if memory_gib else memory.of(device)
    teacher = None
    if teacher_model is not None:
        has_own = device == "gpu" and memory_gib is None and len(memory.gpus) > 1
        teacher = Teacher(
            shape=ModelShape.read(teacher_model),
            dtype_bytes=_DTYPE_BYTES[teacher_dtype],
            apart=teacher_apart or has_own,
        )
    found = forecast(run.spec, shape, device=device, limit=limit, teacher=teacher)
    if "hidden states" in found.parts["student"] and teacher is None:
        session.note(
            "loss.hidden_mse: the teacher is taken for as wide as the student; --teacher-model tells more."
        )
    if session.as_json:
        session.emit(found.as_json())
    else:
        _show(session, found)
    return 0 if found.fits else EXIT_IMPOSSIBLE


def _show(session: Session, found: Forecast) -> None:
    from stillhouse.client.terminal.render import columns, size_text

    limit, copies, device = found.limit, found.copies, found.device
    for name, each in found.parts.items():
        total = found.totals[name]
        session.say(f"{name} ({device}): {size_text(total)} of {size_text(limit)}")
        session.say(columns((f"  {part}", size_text(number)) for part, number in each.items()))
        if total > limit:
            session.say(f"  It cannot fit: {size_text(total - limit)} too much.")
    if copies > 1 or found.is_beside:
        together = found.together
        what = f"{copies} training processes" if copies > 1 else "student"
        what += " and teacher on one device" if found.is_beside else " on one device"
        session.say(f"{what}: {size_text(together)} of {size_text(limit)}")
        if together > limit:
            session.say(f"  They cannot fit: {size_text(together - limit)} too much.")
        elif found.is_beside and device == "gpu":
            share = math.floor(100 * (1 - copies * found.totals["student"] / limit)) / 100
            session.say(
                f"  vLLM takes 0.9 of a GPU by default: start the teacher with --gpu-memory-utilization {share:g} at most."
            )
    for text, then in found.helps:
        fitting = ", which fits" if found.would_fit(then) else ""
        session.say(f"  {text} would take {size_text(then)}{fitting}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Memory:
    """Bytes of a host and of its GPUs."""

    host: int | None
    gpus: Sequence[int]

    def of(self, device: str) -> int:
        """Bytes of the host, or of its largest GPU."""
        from stillhouse.client.core.errors import usage_error

        limit = self.host if device == "cpu" else max(self.gpus, default=None)
        if not limit:
            raise usage_error("the machine's memory is unknown; give --memory-gib.")
        return limit


def _memory_here(found: Sequence[Gpu]) -> _Memory:
    from stillhouse.protos.telemetry.host_memory import memory_bytes

    return _Memory(host=memory_bytes(), gpus=[each.total_bytes for each in found])


def _student(run: RunFile, named: Path | None) -> Path | None:
    """The directory or config.json of the student: as named, or student.model from here or beside the run file."""
    source = named or Path(run.spec.student.model)
    if source.exists() or named is not None:
        return source
    beside = run.directory / source
    return beside if beside.exists() else None


def _asked(session: Session, run: RunFile) -> tuple[ModelShape, _Memory]:
    """Shape of a student that is not on this machine, and memory of the trainer's host."""
    from stillhouse.client.core.errors import usage_error
    from stillhouse.client.estimate.model_shape import ModelShape
    from stillhouse.protos.errors import StillhouseError

    model = run.spec.student.model
    try:
        found = session.trainer.inspect_student(model, run.spec.student.revision)
    except StillhouseError as error:
        raise usage_error(
            f"{model} is not on this machine, and the trainer does not tell its sizes ({error.message.rstrip('.')}); give its "
            "directory or config.json as --student-model."
        ) from error
    shape = ModelShape.parse(found.config_json, model)
    return shape, _Memory(host=found.host_memory_bytes, gpus=found.gpu_memory_bytes)
