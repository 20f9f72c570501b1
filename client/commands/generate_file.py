"""`stillhouse generate --in FILE --out FILE`: runs a batch with the command's options and shows its progress."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stillhouse.client.terminal.session import Session

if TYPE_CHECKING:
    from stillhouse.client.batch.pipeline import BatchSummary


def run_batch(session: Session, source: Path, out: Path, options: dict[str, Any], **rest: Any) -> int:
    """Completes `source` into `out` and returns the exit code. `options` are sampling options, `rest` fields of BatchSettings."""
    from stillhouse.client.batch.dispatcher import MAX_INFLIGHT
    from stillhouse.client.batch.input_rows import Sampling
    from stillhouse.client.batch.pipeline import CAPTURE_TOP_K, BatchSettings, Listeners, generate_file
    from stillhouse.client.core.errors import ExitCode
    from stillhouse.client.terminal.batch_progress import progress_bar

    top_k = options.pop("top_k_logprobs")
    if top_k and rest["capture"] is None:
        raise click.UsageError(
            "--top-k-logprobs needs --capture DIR; rows of OpenAI's format request logprobs themselves."
        )
    settings = BatchSettings(
        sampling=Sampling(**options),
        top_k=top_k or CAPTURE_TOP_K,
        **rest | {"max_inflight": rest["max_inflight"] or MAX_INFLIGHT},
    )
    with progress_bar(out.name, visible=not session.as_json) as bar:

        def on_lost(error: Exception, pause_s: float) -> None:
            note(f"{error} Trying again in {pause_s:.1f} s; finished samples are not generated again.")

        def note(text: str) -> None:
            if not bar.line(text):
                session.note(text)

        listeners = Listeners(progress=bar.show, note=note, lost=on_lost)
        try:
            summary = generate_file(session.teachers, source, out, settings, listeners)
        except KeyboardInterrupt:
            note("Interrupted; the same command resumes it.")
            return ExitCode.INTERRUPTED
    files = {"out": str(summary.out), "failed_file": summary.failed_file and str(summary.failed_file)}
    session.show(asdict(summary) | files | {"seconds": round(summary.seconds, 3)}, _text(summary))
    return 1 if summary.failed else 0


def _text(summary: BatchSummary) -> str:
    text = f"{summary.out}: {summary.rows} rows"
    if summary.failed:
        where = f" (see {summary.failed_file})" if summary.failed_file is not None else ""
        text += f", {summary.failed} failed{where}"
    rate = summary.tokens / max(summary.seconds, 1e-9)
    return f"{text}; {summary.asked} of them in this command, {summary.tokens} tokens in {summary.seconds:.1f} s, {rate:.0f} tokens/s"
