"""Soak of the run service: many short runs while it is killed again and again; every run must end once, as expected,
with nothing lost.

Services and training processes are real, with the smallest student. Some runs are stopped while queued or training,
and some cannot succeed; afterwards `history` checks the store and the run directories.
"""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import click
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.soak.history import History, check
from stillhouse.client.api import RunHandle, StillhouseError, Trainer
from stillhouse.client.core.connection import CONNECTED_S
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.support.programs import Program, ProgramError, start_trainer

T = TypeVar("T")
Fate = Literal["completes", "stopped in the queue", "stopped while it trains", "fails"]
STEPS = 3
ENDLESS = 1_000_000
PATIENCE_S = 300.0
"""Longest retry of a caller while the service is down; on a busy machine it starts slowly."""
LOOK_S = 2.0
"""Interval between listings of all runs, whose cost for the service grows with their number."""
STALL_S = 900.0
"""Time without an ended run after which a soak fails."""
TELL_RUNS = 10
"""Runs between two lines of progress."""
MARK = "STILLHOUSE_SOAK"
"""Environment variable that marks all processes of a soak."""
ENDED = frozenset({Run.STATE_STOPPED, Run.STATE_COMPLETED, Run.STATE_FAILED})


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """One run to submit."""

    fate: Fate
    request_id: str
    spec: Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class SoakResult:
    """Result of a soak."""

    states: Mapping[str, int]
    """Fate to runs that had it."""
    kills: int
    seconds: float
    metrics: int
    """Metric points, the same in journals and store."""
    most_at_once: int
    faults: Sequence[str]
    """Defects; empty for success."""


@click.command(context_settings={"show_default": True})
@click.option("--runs", default=200, type=click.IntRange(1), help="Number of runs.")
@click.option("--kills", default=10, type=click.IntRange(0), help="Number of kills of the service.")
@click.option("--slots", default=4, type=click.IntRange(1), help="Concurrent runs.")
@click.option("--seed", default=1, help="Seed of the times of kills and of the runs' fates.")
@click.option("--database", help="URL of a PostgreSQL database to use instead of a file.")
def main(*, runs: int, kills: int, slots: int, seed: int, database: str | None) -> None:
    """Run many short runs through a service that is killed meanwhile, and check that nothing was lost."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-soak-") as directory:
        try:
            outcome = soak(Path(directory), runs=runs, kills=kills, slots=slots, seed=seed, database=database)
        except ProgramError as error:
            click.echo(str(error), err=True)
            sys.exit(1)
    table = Table(title=f"{runs} runs, {slots} slots, service killed {outcome.kills} times (seed {seed})")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for fate, number in outcome.states.items():
        table.add_row(f"runs: {fate}", str(number))
    table.add_row("metric points, in journals and store alike", str(outcome.metrics))
    table.add_row("most runs at once", str(outcome.most_at_once))
    table.add_row("seconds", f"{outcome.seconds:.0f}")
    table.add_row("faults", str(len(outcome.faults)))
    Console().print(table)
    for fault in outcome.faults:
        click.echo(fault, err=True)
    sys.exit(1 if outcome.faults else 0)


def soak(
    directory: Path, *, runs: int, kills: int, slots: int, seed: int, database: str | None = None
) -> SoakResult:
    """Submits `runs` runs while the service is killed `kills` times, waits for all to end, and checks the records."""
    plans = _plans(directory, runs, seed)
    service = _Service(directory, slots, database)
    began_s = time.monotonic()
    try:
        service.start()
        with Trainer(service.target) as trainer:
            submitter = _Submitter(trainer, plans)
            submitter.start()
            killed = _kill_meanwhile(
                service, submitter, runs=runs, kills=kills, generator=random.Random(seed)
            )
            submitter.join(PATIENCE_S)
            again = {plan.request_id: _ask(trainer, plan).id for plan in plans}
        seconds = time.monotonic() - began_s
        left = service.processes() - {service.program.pid}
        orphans = [f"processes outlived their runs: {sorted(left)}"] if left else []
    except StillhouseError as error:
        ended = service.program.process.poll()
        raise ProgramError(
            f"{error}\nThe service's exit code: {ended}. Its log:\n{service.program.log()}"
        ) from error
    finally:
        service.end()
    submitted = submitter.ids
    history = History.read(directory / "data", database)
    faults = [
        *orphans,
        *check(history, {plan.request_id: plan.fate for plan in plans}, submitted, steps=STEPS),
    ]
    if again != submitted:
        faults.append("a repeated request made another run")
    if history.most_at_once > slots:
        faults.append(f"{history.most_at_once} runs at once on {slots} slots")
    return SoakResult(
        states=Counter(plan.fate for plan in plans),
        kills=killed,
        seconds=seconds,
        metrics=history.num_metrics,
        most_at_once=history.most_at_once,
        faults=faults,
    )


class _Service:
    """A run service at one address that can be killed and restarted."""

    def __init__(self, directory: Path, slots: int, database: str | None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.target = f"127.0.0.1:{free.getsockname()[1]}"
        self._directory = directory
        self._mark = uuid.uuid4().hex
        self._options = [
            "--listen",
            self.target,
            "--cpu-slots",
            str(slots),
            "--gpus",
            "",
            "--log-level",
            "warning",
        ]
        self._options += ["--stop-grace-s", "120", "--metrics-port", "0"]
        self._environment = {MARK: self._mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if database is not None:
            self._environment["STILLHOUSE_TRAINER_DATABASE"] = database
        self.program: Program

    def start(self) -> None:
        """Starts the service; returns once it responds."""
        self.program = start_trainer(
            self._directory / "data",
            directory=self._directory / "log",
            options=self._options,
            environment=self._environment,
        )

    def kill(self) -> None:
        """Ends the service with SIGKILL; training processes continue."""
        self.program.process.kill()
        self.program.process.wait()

    def processes(self) -> set[int]:
        """Live processes that any incarnation of this service has started, and itself."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get(MARK) == self._mark:
                    found.add(process.pid)
        return found

    def end(self) -> None:
        """Ends all processes."""
        if hasattr(self, "program"):
            self.program.stop()
        for pid in self.processes():
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()


def _plans(directory: Path, runs: int, seed: int) -> list[RunPlan]:
    """Plans the runs: seven of ten complete, one fails, one is stopped while queued and one while training."""
    from tests.support.small_models import make_model, make_tokenizer

    sentences = [f"{name} has {number} boats." for name in ("Ada", "Ben", "Cleo") for number in range(9)]
    student, rows, broken = directory / "student", directory / "rows.jsonl", directory / "broken.jsonl"
    tokenizer = make_tokenizer(sentences, directory / "tokenizer", 300)
    make_model(student, tokenizer_dir=tokenizer, hidden_size=32, num_layers=1, num_heads=1, seed=1)
    rows.write_text(
        "".join(f'{{"prompt": "{each[:4]}", "completion": "{each[4:]}"}}\n' for each in sentences)
    )
    broken.write_text('{"prompt": "a", "completion": 7}\n')
    generator = random.Random(seed)
    fates: tuple[Fate, ...] = ("completes", "fails", "stopped in the queue", "stopped while it trains")
    plans = []
    for number in range(runs):
        fate = {1: fates[1], 4: fates[2], 8: fates[3]}.get(number % 10, fates[0])
        spec = {
            "display_name": f"{number}: {fate}",
            "student": {"model": str(student)},
            "data": {
                "train": [{"path": str(broken if fate == "fails" else rows)}],
                "max_sequence_tokens": 32,
                "eval_fraction": 0.1,
            },
            "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
            "optimizer": {
                "max_steps": ENDLESS if fate.startswith("stopped") else STEPS,
                "micro_batch_size": 2,
                "learning_rate": 1e-3,
            },
            "checkpoint": {"every_steps": ENDLESS},
        }
        request_id = str(uuid.UUID(int=generator.getrandbits(128), version=4))
        plans.append(RunPlan(fate=fate, request_id=request_id, spec=spec))
    return plans


class _Submitter(threading.Thread):
    """Submits every run; those to be stopped in the queue are stopped at once."""

    def __init__(self, trainer: Trainer, plans: Sequence[RunPlan]) -> None:
        super().__init__(daemon=True)
        self.trainer = trainer
        self.ids: dict[str, str] = {}
        """Request id to run id."""
        self.error: StillhouseError | None = None
        """Error that ended the thread."""
        self._plans = plans

    def run(self) -> None:
        stoppers = []
        try:
            for plan in self._plans:
                run = _ask(self.trainer, plan)
                self.ids[plan.request_id] = run.id
                if plan.fate == "stopped in the queue":
                    _patiently(run.stop)
                elif plan.fate == "stopped while it trains":
                    stoppers.append(threading.Thread(target=self._stop_in_training, args=(run,), daemon=True))
                    stoppers[-1].start()
        except StillhouseError as error:
            self.error = error
        for each in stoppers:
            each.join()

    def _stop_in_training(self, run: RunHandle) -> None:
        """Stops the run after its first step, retrying through every kill."""
        try:
            _patiently(lambda: _wait_for_step(run))
            _patiently(run.stop)
        except StillhouseError as error:
            self.error = error


def _ask(trainer: Trainer, plan: RunPlan) -> RunHandle:
    """Submits a plan's run, retrying as long as needed; idempotent."""
    return _patiently(lambda: trainer.create_run(dict(plan.spec), request_id=plan.request_id))


def _wait_for_step(run: RunHandle) -> None:
    """Waits until the run has taken a step or has ended; reopens the watch when the service is back."""
    for event in run.watch():
        if event.run.progress.step or event.metrics.step:
            return


def _patiently(ask: Callable[[], T]) -> T:
    """Returns the result of `ask`, retried while no service responds. Raises permanent errors, and the last error."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        asked_s = time.monotonic()
        try:
            return ask()
        except StillhouseError as error:
            if time.monotonic() - asked_s > CONNECTED_S:  # a broken watch
                deadline = time.monotonic() + PATIENCE_S
            if not error.retryable or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _kill_meanwhile(
    service: _Service, submitter: _Submitter, *, runs: int, kills: int, generator: random.Random
) -> int:
    """Kills and restarts the service at random times until all runs have ended; returns the number of kills."""
    moments = sorted(generator.uniform(0, runs) for _ in range(kills))
    killed, deadline, ended_before, told = 0, time.monotonic() + STALL_S, -1, 0
    while True:
        ended = _patiently(lambda: sum(1 for _ in submitter.trainer.runs(ENDED)))
        if ended > ended_before:
            ended_before, deadline = ended, time.monotonic() + STALL_S
        if ended >= told + TELL_RUNS:
            told = ended
            click.echo(f"{ended} of {runs} runs have ended; the service was killed {killed} times", err=True)
        if ended >= runs and killed == kills:
            return killed
        if submitter.error is not None or time.monotonic() > deadline:
            raise ProgramError(
                f"{ended} of {runs} runs have ended, and nothing follows ({submitter.error}). {service.program.log()}"
            )
        if killed < kills and ended >= moments[killed]:
            time.sleep(generator.uniform(0, 1))
            service.kill()
            killed += 1
            time.sleep(generator.uniform(0, 0.5))
            service.start()
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
