"""The training process: `python -m stillhouse.student_trainer.train RUN_DIR --attempt N`; its last event is its outcome.

Without a run service, also on several hosts that share the disk of RUN_DIR, one such command on each of them:
`torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m stillhouse.student_trainer.train RUN_DIR
--attempt 1 --spec run.yaml`. After a stop or a failure the same with --attempt 2 resumes, with any number of processes.

Exit code 0: completed or stopped. EXIT_FAILED: a `failed` event has the error. EXIT_DISK_FULL: no space for one.
Any other: it died, or another process owns the run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
import structlog
import yaml
from google.protobuf import json_format

from stillhouse.protos.errors import Reason, StillhouseError, to_json, to_status
from stillhouse.protos.files.disk_errors import is_full
from stillhouse.protos.import_scans import keep_scans
from stillhouse.protos.library_errors import is_failure
from stillhouse.protos.library_imports import MODEL_MODULES, collector_paused, import_modules
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.protos.telemetry.logs import (
    configure_logging,
    end_output_with_handlers,
    quieten_libraries,
)
from stillhouse.protos.telemetry.tracing import configure_tracing, process_span
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.config.settled.cpu_threads import yield_cores
from stillhouse.student_trainer.config.settled.micro_batch import HALVE_VARIABLE, smaller_micro_batch
from stillhouse.student_trainer.run_dir import EXIT_DISK_FULL, EXIT_FAILED, Attempt, RunDir
from stillhouse.student_trainer.train.distributed.follower import Follower
from stillhouse.student_trainer.train.distributed.launcher import (
    RankProcesses,
    exit_with_first_process,
    report_failure,
)
from stillhouse.student_trainer.train.distributed.rank_env import RankInfo
from stillhouse.student_trainer.train.process.causes import explain
from stillhouse.student_trainer.train.process.heartbeat import heartbeats

if TYPE_CHECKING:
    from stillhouse.student_trainer.train.setup.scope import Outcome

log = structlog.get_logger()

DIRECTORY_WAIT_S = 60.0
"""Time until other hosts see a run directory that the first process has made."""
EXIT_NOT_OWNER = 4
"""Exit code of a process that another one has replaced; it writes nothing more."""


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--attempt", type=click.IntRange(1), required=True, help="Number of this process among those of the run."
)
@click.option(
    "--spec",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Run file whose run this is; makes RUN_DIR if it is not there. For runs that no service starts.",
)
@click.option("--worker", is_flag=True, hidden=True, help="Started by the first process of the attempt.")
def main(*, run_dir: Path, attempt: int, spec: Path | None, worker: bool) -> None:
    """Train the run in RUN_DIR, alone or as one of several processes that torchrun has started."""
    prepare_output()
    given = RankInfo.from_environment()
    if worker:
        exit_with_first_process()
    rank = {"rank": given.rank} if given else {}
    structlog.contextvars.bind_contextvars(run=run_dir.name, attempt=attempt, **rank)
    _ensure_run_dir(RunDir(run_dir), spec, given)
    take_attempt(run_dir, attempt, given)


def prepare_output() -> None:
    """Sets up what this process writes. Call once, before libraries are imported."""
    end_output_with_handlers()
    configure_logging("info")
    quieten_libraries()


def take_attempt(run_dir: Path, attempt: int, given: RankInfo | None = None) -> NoReturn:
    """Trains an attempt and exits with its code; `given` is this process's place among several of a launcher."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        configure_tracing("stillhouse-train")
        with (
            process_span("train", run=run_dir.name, attempt=attempt),
            _open_attempt(RunDir(run_dir), attempt, given) as opened,
            heartbeats(opened),
        ):
            sys.exit(work(opened, stop.is_set, given))
    except StillhouseError as error:
        log.error("not the owner of the run", why=error.message)  # noqa: TRY400 - no bug, so no traceback
        sys.exit(EXIT_NOT_OWNER)
    except OSError as error:  # the error cannot be written either
        if not is_full(error):
            raise
        sys.exit(EXIT_DISK_FULL)


def work(attempt: Attempt, stopped: Callable[[], bool] = lambda: False, given: RankInfo | None = None) -> int:
    """Trains and reports; the exit code. Raises StillhouseError(RUN_STATE) if another attempt owns the run.

    `given` is this process's place among several of a launcher.
    """

    def stop_requested() -> bool:
        return stopped() or attempt.stop_requested

    log.info("run opened")
    try:
        config = from_proto(attempt.run_dir.effective_spec())
        if os.environ.get(HALVE_VARIABLE) == "1":
            config = smaller_micro_batch(config) or config
            optimizer = config.optimizer
            log.info(
                "passes halved",
                micro_batch_size=optimizer.micro_batch_size,
                micro_batch_tokens=optimizer.micro_batch_tokens or "auto",
            )
        yield_cores(config)
        with RankProcesses(config, attempt, stopped, given) as processes:
            outcome = _run_task(config, attempt, stop_requested, processes)
    except BaseException as caught:  # every failure is reported in the run directory
        if not is_failure(caught):
            raise
        error = explain(caught, attempt.run_dir.path)
        if isinstance(error, StillhouseError) and error.reason is Reason.RUN_STATE:
            raise error from caught
        status = to_status(error)
        log.error("run failed", why=status.message)  # noqa: TRY400 - to_status logs the traceback of a bug
        attempt.report("failed", error=to_json(status))
        report_failure(status)
        return EXIT_FAILED
    attempt.report(outcome.kind, step=outcome.step)
    log.info(f"run {outcome.kind}", step=outcome.step)
    return 0


def _ensure_run_dir(run_dir: RunDir, spec: Path | None, given: RankInfo | None) -> None:
    """Makes the run directory from a run file, if there is none; the other processes wait for the first one to do so."""
    deadline = time.monotonic() + DIRECTORY_WAIT_S
    first = given is None or given.rank == 0
    while not run_dir.effective_spec_path.exists():
        if spec is None:
            raise click.UsageError(f"{run_dir.path} is not a run directory; make it with --spec FILE.")
        if first:
            try:
                message = json_format.ParseDict(yaml.safe_load(spec.read_text()), RunSpec())
                RunDir.create(run_dir.path, message, to_proto(from_proto(message)))
            except (yaml.YAMLError, json_format.ParseError, ValueError, TypeError, StillhouseError) as error:
                raise click.UsageError(f"{spec} is not a run file: {error}") from error
        elif time.monotonic() > deadline:
            raise click.UsageError(
                f"{run_dir.path} does not appear on this host. Put it on a disk that all hosts share."
            )
        else:
            time.sleep(0.2)


def _open_attempt(run_dir: RunDir, attempt: int, given: RankInfo | None) -> AbstractContextManager[Attempt]:
    """The run, held by the first process of the attempt and followed by the others."""
    if given is None or given.rank == 0:
        return run_dir.open_attempt(attempt)
    return nullcontext(Follower.open(run_dir, attempt))


def _run_task(
    config: RunConfig, attempt: Attempt, stop_requested: Callable[[], bool], processes: RankProcesses
) -> Outcome:
    """Runs the task. Imports torch only here: its threads are set, and the other processes have been started."""
    perform: Callable[[], Outcome]
    with collector_paused():
        prepare_libraries()
        if config.builds_cache:
            from stillhouse.student_trainer.train.cache_build.build import build

            perform = partial(build, config, attempt, stop_requested)
        elif config.task == "evaluate":
            from stillhouse.student_trainer.train.evaluation_run.run import evaluate

            perform = partial(evaluate, config, attempt, stop_requested)
        else:
            from stillhouse.student_trainer.train.loop import train

            perform = partial(train, config, attempt, stop_requested, processes.ranks())
        import_modules(MODEL_MODULES)
    log.info("libraries imported")
    return perform()


def prepare_libraries() -> None:
    """Sets what libraries read at import, and imports transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in (
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS",
    ):
        os.environ.setdefault(name, "1")
    # Deterministic matrix products need it on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep_scans()
    import transformers

    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
