"""Trains students in pairs through a run service, by cross-entropy and by distillation, with all else equal."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.client.api import RunHandle, StillhouseError, Trainer
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
    """Settings that the runs of a comparison share."""

    train: Path
    """JSONL to train on."""
    held_out: Path
    """JSONL to evaluate on."""
    held_out_rows: int
    """Most rows of it to use."""
    steps: int
    batch_size: int
    max_sequence_tokens: int
    top_k: int = 64
    """Top-k tokens that the teacher sends in training. In evaluations it sends as many as it may."""
    precision: str | None = None
    """None leaves the choice to the service."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Metrics of a student on the held-out rows, as the run reported them."""

    kl: float
    """KL(teacher || student) in nats per token; tokens beyond the teacher's largest top_k count as one."""
    perplexity: float
    """Perplexity of the text."""
    agreement: float
    """Share of tokens at which teacher and student have the same top-1 token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunScores:
    """A completed run: the student's scores before and after."""

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
    """Returns the spec of one run. A cross-entropy run names the teacher too, but queries it only in evaluations."""
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
    spec.optimizer.batch_size = recipe.batch_size
    spec.optimizer.seed = seed
    if recipe.precision is not None:
        spec.optimizer.precision = recipe.precision
    return spec


def complete(
    trainer: Trainer, specs: Sequence[RunSpec], *, report: Callable[[Run], None] = lambda _run: None
) -> Generator[tuple[int, RunScores], None, None]:
    """Yields (index in `specs`, scores of that run) as runs complete.

    The service trains as many at once as it has slots. `report` is called with each run repeatedly until it has ended.
    Raises `RunFailedError` for the first run that ends without completing. Runs that are left are stopped.
    """
    unfinished: dict[int, RunHandle] = {}
    try:
        for index, spec in enumerate(specs):
            unfinished[index] = trainer.create_run(spec)
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
                yield index, run_scores(handle)
            time.sleep(POLL_S if unfinished else 0)
    finally:
        # A run that waits would start with the next service on this data.
        for handle in reversed(unfinished.values()):
            with suppress(StillhouseError):
                handle.stop()


def run_scores(handle: RunHandle) -> RunScores:
    """Returns the first and the last evaluation of a completed run."""
    series = handle.metrics("eval/kl", "eval/perplexity", "eval/agreement")

    def at(index: int) -> Scores:
        return Scores(
            kl=float(series["eval/kl"].values[index]),
            perplexity=float(series["eval/perplexity"].values[index]),
            agreement=float(series["eval/agreement"].values[index]),
        )

    return RunScores(name=handle.name, before=at(0), after=at(-1))


def best_learning_rate(results: Mapping[float, RunScores]) -> float:
    """Returns the learning rate whose student has the lowest held-out perplexity."""
    return min(results, key=lambda learning_rate: results[learning_rate].after.perplexity)
