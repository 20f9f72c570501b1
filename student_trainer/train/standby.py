"""A training process that waits for its run: `python -m stillhouse.student_trainer.train.standby DATA_DIR`.

It imports what a run imports and touches nothing of a run. One line on its standard input, `Order` as JSON, makes it the training
process of an attempt: its output goes to the attempt's log, its directory is the run's, it replies TAKEN on its standard input, which
is a socket, and goes on as one that was started for that attempt. The end of the input without a line ends it: no standby process
outlives its service.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from pathlib import Path
from typing import NoReturn

import structlog

from stillhouse.protos.library_imports import MODEL_MODULES, collector_paused, import_modules
from stillhouse.student_trainer.config.settled.cpu_threads import wait_passively
from stillhouse.student_trainer.config.settled.micro_batch import HALVE_VARIABLE
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.standby_order import ADAPTER_VARIABLE, TAKEN, Order
from stillhouse.student_trainer.train.__main__ import prepare_libraries, prepare_output, take_attempt
from stillhouse.student_trainer.train.setup.first_use import load_first_use

RUN_MODULES = (
    "stillhouse.student_trainer.train.loop",
    "stillhouse.student_trainer.train.distributed.ranks",
)
OOM_SCORE = Path("/proc/self/oom_score_adj")
FIRST_VICTIM = "1000"


def main() -> NoReturn:
    """Imports, waits for the order, and trains."""
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    own_score = _offer_as_victim()
    # In a thread: the service may end, or have a run, while libraries are imported.
    threading.Thread(target=_receive, args=(orders, own_score), name="standby", daemon=True).start()
    prepare_output()
    wait_passively()
    trains_adapter = os.environ.pop(ADAPTER_VARIABLE, "") == "1"
    with collector_paused():
        prepare_libraries()
        import_modules((*RUN_MODULES, *MODEL_MODULES, *(["peft"] if trains_adapter else [])))
    if orders.empty():
        load_first_use()
    order = orders.get()
    os.environ[HALVE_VARIABLE] = str(int(order.halve))
    structlog.contextvars.bind_contextvars(run=order.run_dir.name, attempt=order.attempt)
    take_attempt(order.run_dir, order.attempt)


def _offer_as_victim() -> str:
    """Lets this process go before the run that trains where memory runs out; returns the score that it had before, if any."""
    try:
        before = OOM_SCORE.read_text()
        OOM_SCORE.write_text(FIRST_VICTIM)
    except OSError:
        return ""
    return before


def _receive(orders: queue.SimpleQueue[Order], own_score: str) -> None:
    """Takes the place of a process that was started for the order; ends this one if none comes."""
    try:
        line = b""
        while not line.endswith(b"\n"):
            # Not through sys.stdin, whose lock the interpreter takes at its end.
            part = os.read(0, 4096)
            if not part:
                os._exit(0)
            line += part
        order = Order.from_line(line)
        service = os.dup(0)
        _take_place(RunDir(order.run_dir).log_path(order.attempt), order.run_dir)
        if own_score:
            OOM_SCORE.write_text(own_score)
        with contextlib.suppress(OSError):  # the service has died since: a later one adopts the run
            os.write(service, TAKEN)
        os.close(service)
    except BaseException:  # its log may not be open, and the main thread waits
        os._exit(1)
    orders.put(order)


def _take_place(log_path: Path, directory: Path) -> None:
    # The log comes first: by it a later service finds the process of the attempt.
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for source, descriptor in ((log, 1), (log, 2), (nowhere, 0)):
        os.dup2(source, descriptor)
    os.close(log)
    os.close(nowhere)
    os.chdir(directory)


if __name__ == "__main__":
    main()
