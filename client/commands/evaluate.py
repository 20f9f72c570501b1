"""`stillhouse eval`: scores a run, a checkpoint or a model on rows, or texts in files beside their references."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stillhouse.client.terminal.finite_float import FiniteFloat
from stillhouse.client.terminal.session import Session, command
from stillhouse.protos.evaluation.names import CHOICE_METRICS, MATCHES, METRICS, TEXT_METRICS

if TYPE_CHECKING:
    from stillhouse.client.trainer.run_handle import RunHandle
    from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec

REPORT = "evaluations/report.json"
"""Artifact with the report of a run; protos/evaluation/report.py has its format."""
_NONE = "none"
_ADDRESS = re.compile(r"[^/\s]+:[0-9]{1,5}")

_OF_TARGET = {
    **{name: name for name in ("data", "against", "baseline", "tokenizer", "limit", "temperature")},
    **{
        "sets": "set",
        "top_p": "top-p",
        "max_new_tokens": "max-new-tokens",
        "no_wait": "no-wait",
        "shows": "report",
    },
}
"""Options that texts in files have no use for."""


@command(name="eval")
@click.argument("target", default="")
@click.option(
    "--data",
    "data",
    multiple=True,
    metavar="FILE",
    help="Rows to evaluate on: a file here, which is copied to the trainer, or a path or datasets/... there.",
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="NAME=FILE",
    help="A further set under a name of its own; may be repeated.",
)
@click.option("--metric", "metrics", multiple=True, type=click.Choice(METRICS), help="May be repeated.")
@click.option(
    "--match", type=click.Choice(MATCHES), help="How accuracy compares an answer with its reference."
)
@click.option(
    "--against",
    metavar="HOST:PORT",
    help=f"Teacher to compare with; for a run that of the run, {_NONE} for none.",
)
@click.option(
    "--baseline",
    metavar="MODEL",
    help=f"Model before; for a run the student that it began with, {_NONE} for none.",
)
@click.option(
    "--tokenizer", metavar="MODEL", help="Model whose tokenizer a served teacher has, where TARGET is one."
)
@click.option("--limit", type=click.IntRange(1), help="Rows of each set at most, from the first.")
@click.option(
    "--temperature", type=FiniteFloat(), help="Of written text. [default: the model's own settings]"
)
@click.option("--top-p", type=FiniteFloat(), help="Of written text.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Of written text.")
@click.option("--no-wait", is_flag=True, help="Return once the evaluation is queued.")
@click.option(
    "--report", "shows", is_flag=True, help="Show the report that run TARGET has; evaluate nothing."
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the report there as JSON."
)
@click.option(
    "--hypotheses",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Texts to score, one a line, without a model or a service; needs --references.",
)
@click.option(
    "--references",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Their references, one a line.",
)
def evaluate(session: Session, *, target: str, **options: Any) -> int:
    """Evaluate TARGET, or texts in files.

    TARGET is a run, RUN/checkpoints/STEP, a model's directory on the trainer's host, a hub id, or with --tokenizer the
    HOST:PORT of a served teacher. The evaluation is a run of the trainer (`stillhouse run` watches, stops and lists it) and
    its report stays with it. A run is evaluated on its own held-out rows and sets unless --data or --set names others.
    """
    if options["hypotheses"] or options["references"]:
        if target:
            raise click.UsageError(
                "TARGET writes its own texts; leave it out, or --hypotheses and --references."
            )
        given = [name for name in _OF_TARGET if _is_given(options[name])]
        if given:
            flags = ", ".join(f"--{_OF_TARGET[name]}" for name in given)
            raise click.UsageError(f"{flags} belongs to a TARGET; texts in files are scored as they are.")
        return _files(session, options)
    if not target:
        raise click.UsageError("Give TARGET, or --hypotheses and --references.")
    if options["shows"]:
        return _show(session, session.run(target), options["out"])
    unnamed = next((each for each in options["sets"] if "=" not in each), None)
    if unnamed is not None:
        raise click.UsageError(f"--set {unnamed} has no name; write --set NAME=FILE.")
    from stillhouse.client.commands.run.control import follow
    from stillhouse.client.core.json_output import as_json

    run = session.trainer.create_run(_spec(session, target, options))
    if options["no_wait"]:
        session.show(as_json(run.get()) | {"id": run.id}, f"run {run.id} evaluates {target}")
        return 0
    session.note(f"run {run.id} evaluates {target}")
    if session.as_json:
        from stillhouse.client.core.errors import ExitCode
        from stillhouse.protos.errors import from_status
        from stillhouse.protos.stillhouse.v1.run_pb2 import Run

        ended = run.wait()
        if ended.state == Run.STATE_FAILED:
            raise from_status(ended.error)
        if ended.state == Run.STATE_STOPPED:
            return ExitCode.CONFLICT
    else:
        code = follow(session, run)
        if code:
            return code
    return _show(session, run, options["out"])


def _is_given(value: Any) -> bool:
    """False for what an option is without being given; a number that is zero is given."""
    return value is not None and value is not False and value not in ((), "")


def _spec(session: Session, name: str, options: dict[str, Any]) -> RunSpec:
    """Returns the run that evaluates `name`."""
    from stillhouse.client.trainer.evaluation_spec import (
        evaluation_of,
        evaluation_of_teacher,
        find_target,
    )

    if _ADDRESS.fullmatch(name) and not options["tokenizer"]:
        raise click.UsageError(
            f"{name} is the address of a served teacher; name a model that has its tokenizer with --tokenizer."
        )
    if options["tokenizer"]:
        spec = evaluation_of_teacher(name, options["tokenizer"])
    else:
        spec = evaluation_of(find_target(session.trainer, name))
    evaluation = spec.evaluation
    if options["data"] or options["sets"]:
        for field in ("train", "eval"):
            spec.data.ClearField(field)
        del evaluation.sets[:]
        spec.data.eval_fraction = 0
        spec.ClearField("cache")
    for path in options["data"]:
        spec.data.eval.add(path=_pushed(session, path, checked=True))
    for named in options["sets"]:
        place, _, path = named.partition("=")
        checked = options["match"] != "choices"
        evaluation.sets.add(name=place, path=_pushed(session, path, checked=checked))
    if options["against"]:
        del spec.teachers[:]
        if options["against"] != _NONE:
            spec.teachers.add(targets=options["against"].split(","))
    if options["baseline"]:
        evaluation.ClearField("baseline")
        if options["baseline"] != _NONE:
            evaluation.baseline.model = options["baseline"]
    _settings(spec, options)
    return spec


def _settings(spec: RunSpec, options: dict[str, Any]) -> None:
    """Sets metrics, comparison, limits and sampling."""
    from stillhouse.protos.evaluation.names import TEACHER_METRICS

    evaluation = spec.evaluation
    if options["metrics"]:
        del evaluation.metrics[:]
        evaluation.metrics.extend(options["metrics"])
        for each in evaluation.sets:
            del each.metrics[:]
    if not spec.teachers and not spec.HasField("cache"):
        kept = [each for each in evaluation.metrics if each not in TEACHER_METRICS]
        if not options["metrics"]:
            del evaluation.metrics[:]
            evaluation.metrics.extend(kept)
    if options["match"] == "choices":
        for each in evaluation.sets:
            each.match = "choices"
            each.metrics.extend(name for name in options["metrics"] if name in CHOICE_METRICS)
    elif options["match"]:
        evaluation.match = options["match"]
    if options["limit"]:
        evaluation.limit = options["limit"]
        for each in evaluation.sets:
            each.limit = options["limit"]
    for name in ("temperature", "top_p", "max_new_tokens"):
        if options[name] is not None:
            setattr(evaluation.generation, name, options[name])


def _pushed(session: Session, path: str, *, checked: bool) -> str:
    local = Path(path).expanduser()
    if not local.is_file():
        return path
    session.note(f"copying {local} to the trainer")
    return str(session.trainer.push_dataset(local, checked=checked).name)


def _show(session: Session, run: RunHandle, out: Path | None) -> int:
    """Prints the report of `run`, and writes it to `out`."""
    from stillhouse.client.terminal.evaluation_table import report_text

    with tempfile.TemporaryDirectory() as directory:
        [path] = run.pull(REPORT, Path(directory))
        data = path.read_bytes()
    report = json.loads(data)
    _write(out, data)
    session.show(report | {"run": run.id}, report_text(report))
    return 0


def _files(session: Session, options: dict[str, Any]) -> int:
    """Scores texts beside their references."""
    from stillhouse.client.core.errors import usage_error
    from stillhouse.client.terminal.evaluation_table import report_text
    from stillhouse.protos.evaluation.report import make_report
    from stillhouse.protos.evaluation.row_sums import RowSums, score_texts

    if not (options["hypotheses"] and options["references"]):
        raise click.UsageError("--hypotheses and --references go together.")
    texts, references = _lines(options["hypotheses"]), _lines(options["references"])
    if len(texts) != len(references):
        raise usage_error(
            f"{options['hypotheses']} has {len(texts)} lines and {options['references']} {len(references)}; line N of one "
            "belongs to line N of the other, so both need as many."
        )
    if not texts:
        raise usage_error(f"{options['hypotheses']} is empty; write one text a line.")
    metrics = options["metrics"] or tuple(each for each in TEXT_METRICS if each != "accuracy")
    others = [each for each in metrics if each not in TEXT_METRICS]
    if others:
        raise usage_error(
            f"{', '.join(others)} needs a model's distributions; of texts alone there are {', '.join(TEXT_METRICS)}."
        )
    out = options["out"]
    # Path.resolve raises for links that lead to each other.
    if out is not None and os.path.realpath(out) in {
        os.path.realpath(options[name]) for name in ("hypotheses", "references")
    }:
        raise usage_error(f"{out} is read and would be overwritten. Choose another output.")
    match = options["match"] or "exact"
    if match == "choices":
        raise usage_error(
            "--match choices compares likelihoods, which texts have not; use exact, numeric or fields."
        )
    scores: dict[str, RowSums] = {}
    places = [f"{options['references']}, line {number}," for number in range(1, len(references) + 1)]
    for metric in metrics:
        scores |= score_texts(metric, texts, references, match=match, places=places)
    report = make_report({"texts": {"after": scores}}, {})
    _write(options["out"], json.dumps(report, indent=2).encode() + b"\n")
    session.show(report, report_text(report).replace("AFTER", "VALUE", 1))
    return 0


def _lines(path: Path) -> list[str]:
    """Returns the lines of a file; the last one may lack its end. As for sacrebleu, a carriage return ends none."""
    from stillhouse.client.core.errors import file_errors, usage_error

    try:
        with file_errors("read", path):
            text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise usage_error(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def _write(out: Path | None, data: bytes) -> None:
    from stillhouse.client.core.errors import file_errors
    from stillhouse.protos.files.atomic import write_atomic

    if out is not None:
        with file_errors("write", out):
            write_atomic(out, data)
