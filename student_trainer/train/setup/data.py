"""The data of a run, prepared once: by the first process, while the others wait, or by an earlier run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stillhouse.protos.telemetry.host_cores import openmp_threads, usable_cores
from stillhouse.student_trainer.config.settled.cpu_threads import has_teacher_beside
from stillhouse.student_trainer.prepared_store import FOLDER, PreparedStore
from stillhouse.student_trainer.train.data.corpus import Corpus, assemble
from stillhouse.student_trainer.train.data.prepared.preparation import Prepared, Preparer, check_equal
from stillhouse.student_trainer.train.data.prepared.progress import Progress
from stillhouse.student_trainer.train.data.prepared.settings import ExampleSettings
from stillhouse.student_trainer.train.setup.scope import RunScope

PREPARING = "PREPARING_DATA"


def prepare_corpus(scope: RunScope, tokenizer: Any) -> Corpus:
    """The examples of a run, in tables that the service keeps, or the run where no service does.

    Raises Stopped, or StillhouseError: DATASET_NOT_FOUND, DATASET_INVALID, CACHE_INVALID, TOKENIZER_MISMATCH,
    TOKENIZER_INVALID.
    """
    config, ranks = scope.config, scope.ranks
    datasets = (*config.data.train, *config.data.eval)

    def preparer(alive: Callable[[], None]) -> Preparer:
        return Preparer(
            ExampleSettings.make(config.data, config.teachers),
            tokenizer,
            scope.data_dir,
            store=_store(scope),
            cores=_cores(scope),
            observer=_RunObserver(scope, alive),
        )

    def prepare(alive: Callable[[], None]) -> list[Prepared]:
        with preparer(alive) as own:
            return [own.prepare(each) for each in datasets]

    found = ranks.while_first(prepare)
    names = ranks.exchange([each.name for each in found or ()], patient=True)[0]

    def reopen() -> list[Prepared]:
        with preparer(lambda: None) as own:
            return [own.reopen(name, each) for name, each in zip(names, datasets, strict=True)]

    prepared = ranks.agree(lambda: found or reopen())
    check_equal(ranks.exchange([each.digest for each in prepared]), datasets)
    return assemble(config.data, config.evaluation, prepared)


def _store(scope: RunScope) -> PreparedStore:
    shared = scope.data_dir / FOLDER
    return PreparedStore(shared if shared.is_dir() else scope.run_dir.path / FOLDER)


def _cores(scope: RunScope) -> int:
    """The cores of the run on this host: while it prepares its data, its other processes and its teacher wait."""
    cores, threads = usable_cores(), openmp_threads()
    if threads is None:
        return cores
    own = threads * scope.ranks.size + int(has_teacher_beside(scope.config))
    return max(1, min(own, cores))


class _RunObserver:
    """Reports the preparation as the run's condition and metrics."""

    def __init__(self, scope: RunScope, alive: Callable[[], None]) -> None:
        self._scope = scope
        self._alive = alive
        self._is_told = False

    def check(self) -> None:
        """Raises Stopped if the run shall stop."""
        self._scope.patience.on_check()
        self._alive()

    def progress(self, progress: Progress | None) -> None:
        """Reports rows, rows a second and time left; nothing of them once it is over."""
        attempt = self._scope.attempt
        if (progress is not None) is not self._is_told:
            self._is_told = progress is not None
            attempt.report("condition", condition=PREPARING if self._is_told else "")
        if progress is not None:
            values = {
                "data/prepared_rows": float(progress.rows),
                "data/rows_per_second": progress.rows_per_second,
            }
            if progress.left_s is not None:
                values |= {"data/left_s": progress.left_s, "data/rows": float(progress.total or 0)}
            attempt.report_metrics(0, values)
