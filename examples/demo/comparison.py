"""Trains students in pairs through a run service, by cross-entropy and distilled; all else is equal between the two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.client.api import RunHandle, Trainer
from stillhouse.client.trainer.run_handle import ENDED
from stillhouse.protos.stillhouse.v1.run_pb2 import Run, RunSpec

Method = Literal["cross-entropy", "distilled"]
METHODS: tuple[Method, ...] = ("cross-entropy", "distilled")
POLL_S = 0.5
LARGEST_TOP_K = 256


class RunFailedError(RuntimeError):
    """A run ended without completing; the message is its own error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What the runs of a comparison have in common."""

    train: Path
    """JSONL to learn from."""
    held_out: Path
    """JSONL to measure on."""
    held_out_rows: int
    """Rows of it to use at most."""
    steps: int
    batch_size: int
    max_sequence_tokens: int
    top_k: int = 64
    """Likeliest tokens that the teacher sends in training. In evaluations it sends the most that it may."""
    precision: str | None = None
    """None leaves it to the service."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """A student on the held-out rows; what the run itself reported."""

    kl: float
    """KL(teacher || student) in nats per token, tokens beyond the teacher's largest top_k counted as one."""
    perplexity: float
    """Of the text."""
    agreement: float
    """Share of tokens at which teacher and student find the same token likeliest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A completed run: the student as it was given and as it came out."""

    name: str
    """Resource name of the run."""
    before: Scores
    after: Scores


def run_spec(
    recipe: Recipe,
    *,
    student: Path,
    teacher: str,
    method: Method,
    learning_rate: float,
    seed: int,
    display_name: str,
) -> RunSpec:
    """The spec of one run. A cross-entropy run names the teacher too, but asks it only in evaluations."""
    spec = RunSpec(display_name=display_name)
    spec.student.model = str(student.resolve())
    spec.teachers.add(targets=[teacher])
    spec.data.train.add(path=str(recipe.train.resolve()))
    spec.data.eval.add(path=str(recipe.held_out.resolve()))
    spec.data.max_sequence_tokens = recipe.max_sequence_tokens
    spec.evaluation.limit = recipe.held_out_rows
    spec.evaluation.top_k = LARGEST_TOP_K
    spec.loss.top_k = recipe.top_k
    if method == "cross-entropy":
        spec.loss.terms.add(divergence="forward_kl", weight=0.0)
        spec.loss.hard_weight = 1.0
    spec.optimizer.learning_rate = learning_rate
    spec.optimizer.max_steps = recipe.steps
    spec.optimizer.micro_batch_size = recipe.batch_size
    spec.optimizer.seed = seed
    if recipe.precision is not None:
        spec.optimizer.precision = recipe.precision
    return spec


def complete(
    trainer: Trainer, specs: Sequence[RunSpec], *, report: Callable[[Run], None] = lambda _run: None
) -> Iterator[tuple[int, Measured]]:
    """(index in `specs`, what came of that run), each as soon as it is complete.

    The service trains as many at once as it has slots. `report` is called with each run again and again until it has
    ended. Raises `RunFailedError` for the first run that ends without completing.
    """
    unfinished = dict(enumerate([trainer.create_run(spec) for spec in specs]))
    while unfinished:
        for index, handle in list(unfinished.items()):
            run = handle.get()
            report(run)
            if run.state not in ENDED:
                continue
            if run.state != Run.STATE_COMPLETED:
                raise RunFailedError(
                    f"{run.name} ({run.spec.display_name}) ended as "
                    f"{Run.State.Name(run.state).removeprefix('STATE_')}: {run.error.message}"
                )
            del unfinished[index]
            yield index, measured(handle)
        time.sleep(POLL_S if unfinished else 0)


def measured(handle: RunHandle) -> Measured:
    """The first and the last evaluation of a completed run."""
    series = handle.metrics("eval/kl", "eval/perplexity", "eval/agreement")

    def at(index: int) -> Scores:
        return Scores(
            kl=float(series["eval/kl"].values[index]),
            perplexity=float(series["eval/perplexity"].values[index]),
            agreement=float(series["eval/agreement"].values[index]),
        )

    return Measured(name=handle.name, before=at(0), after=at(-1))


def best_learning_rate(results: Mapping[float, Measured]) -> float:
    """The learning rate whose student has the lowest held-out perplexity."""
    return min(results, key=lambda learning_rate: results[learning_rate].after.perplexity)
