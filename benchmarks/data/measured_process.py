"""One measured preparation, in a process of its own: prints seconds, rows and memory as JSON."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import psutil

STEP_ROWS = 32
NUM_STEPS = 200


class PeakMemory:
    """Highest anonymous memory of this process and of all that it started, sampled: pages of mapped files are the kernel's."""

    def __init__(self) -> None:
        self.own_bytes = self.all_bytes = 0

    def sample(self) -> None:
        """Takes one sample."""
        own = _anonymous(os.getpid())
        children = psutil.Process().children(recursive=True)
        self.own_bytes = max(self.own_bytes, own)
        self.all_bytes = max(self.all_bytes, own + sum(_anonymous(each.pid) for each in children))


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Samples while the block runs."""
    peak, ended = PeakMemory(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            peak.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
        peak.sample()


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


@click.command()
@click.argument("method", type=click.Choice(["ours", "map-processes", "map-threads"]))
@click.argument("rows", type=click.Path(path_type=Path, exists=True))
@click.argument("tokenizer", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--cores", type=int, required=True)
def main(method: str, rows: Path, tokenizer: Path, folder: Path, cores: int) -> None:
    """Prepare ROWS by METHOD with what is in FOLDER, then take steps of training rows."""
    os.environ["TOKENIZERS_PARALLELISM"] = str(method == "map-threads").lower()
    import torch  # noqa: F401 - as in a training process, whose memory is compared

    began = time.perf_counter()
    with peak_memory() as peak:
        found = (
            _ours(rows, tokenizer, folder, cores)
            if method == "ours"
            else _map(rows, tokenizer, folder, 1 if method == "map-threads" else cores)
        )
    print(
        json.dumps(
            {
                "seconds": found - began,
                "own_mib": peak.own_bytes / 2**20,
                "all_mib": peak.all_bytes / 2**20,
            }
        )
    )


def _ours(rows: Path, tokenizer: Path, folder: Path, cores: int) -> float:
    """Prepares, and takes steps in a run's order; the time at which the first row could be taken."""
    from transformers import AutoTokenizer

    from stillhouse.student_trainer.config.schema import (
        DataConfig,
        DatasetConfig,
        EvaluationConfig,
        OptimizerConfig,
    )
    from stillhouse.student_trainer.prepared_store import PreparedStore
    from stillhouse.student_trainer.train.data.corpus import assemble
    from stillhouse.student_trainer.train.data.prepared.preparation import Preparer
    from stillhouse.student_trainer.train.data.prepared.settings import ExampleSettings
    from stillhouse.student_trainer.train.data.schedule import Schedule

    data = DataConfig(train=(DatasetConfig(path=str(rows)),), date="2025-01-01")
    settings = ExampleSettings(data=data)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    with Preparer(settings, loaded, rows.parent, store=PreparedStore(folder), cores=cores) as preparer:
        corpus = assemble(data, EvaluationConfig(), [preparer.prepare(each) for each in data.train])
    _ = corpus.longest, corpus.largest
    schedule = Schedule.from_config(len(corpus.train), OptimizerConfig(batch_size=STEP_ROWS), seed=0)
    ready = 0.0
    for step in range(min(NUM_STEPS, schedule.total_steps)):
        taken = [corpus.train[row] for row in schedule.rows(step)]
        assert all(each.num_targets for each in taken)
        ready = ready or time.perf_counter()
    return ready


def _map(rows: Path, tokenizer: Path, folder: Path, num_proc: int) -> float:
    """Tokenizes with datasets.map, as its guides do: batched, the columns of text removed."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = batch.get("text") or [
            prompt + completion
            for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)
        ]
        found = loaded([text + loaded.eos_token for text in texts], return_attention_mask=False)
        return {"input_ids": found["input_ids"]}

    table = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder))
    mapped = table.map(
        encode, batched=True, remove_columns=table.column_names, num_proc=num_proc if num_proc > 1 else None
    )
    _ = [mapped[number]["input_ids"] for number in range(min(STEP_ROWS, len(mapped)))]
    return time.perf_counter()


if __name__ == "__main__":
    main()
