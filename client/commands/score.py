"""`stillhouse score`: the teacher's distributions over given sequences of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.teacher.score import ScoreAnswer


@command(name="score")
@click.option(
    "--ids", "path", default="-", metavar="FILE", help="JSON lines of sequences.  [default: standard input]"
)
@click.option(
    "--top-k",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Top-k tokens to report per position.",
)
@click.option("--adapter", default="", help="Adapter of sequences that name none.")
@click.option("--entropy", is_flag=True, help="Report the entropy of each position.")
@click.option("--float16", is_flag=True, help="Halve the bytes on the wire; rounds log-probabilities.")
@click.option("--max-inflight", type=click.IntRange(1), default=None, help="Sequences in flight at most.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Write all distributions to this .npz file."
)
def score(session: Session, *, path: str, out: Path | None, max_inflight: int | None, **options: Any) -> int:
    """Score sequences of token ids.

    Each line of FILE is {"token_ids": [...]}, optionally with an `id`, an `adapter` and the position to `start` at, which
    is P to skip a prompt of P tokens. Prints the log-probability of the tokens from `start` on and their perplexity as they are ready;
    --json adds the values of each position. With --out FILE.npz all arrays go into one file: row `offsets[i]` is the first
    of sequence `ids[i]`. The exit code is 1 if a sequence could not be scored.
    """
    from stillhouse.client.terminal.prompt_input import score_items
    from stillhouse.client.terminal.score_input import ScoreFile

    file = ScoreFile(out) if out is not None else None
    failed = 0
    sequences = score_items(path, options.pop("adapter"))

    def on_lost(error: Exception, pause_s: float) -> None:
        session.note(f"{error} Trying again in {pause_s:.0f} s; unscored sequences are sent again.")

    for answer in session.teacher.score(
        sequences, max_inflight=max_inflight or 0, on_lost=on_lost, **options
    ):
        failed += answer.error is not None
        if file is not None:
            file.add(answer)
        _show(session, answer)
    if file is not None:
        file.write()
    return 1 if failed else 0


def _show(session: Session, answer: ScoreAnswer) -> None:
    from stillhouse.client.commands.generate import distributions_as_json
    from stillhouse.client.core.json_output import error_as_json
    from stillhouse.client.terminal.render import number_text

    distributions = answer.distributions
    if distributions is None:
        assert answer.error is not None
        document = {"id": answer.id, "error": error_as_json(answer.error)}
        session.show(document, f"{answer.id}  Error: {answer.error.message}")
        return
    total, perplexity = _summary(distributions.target_logprobs)
    if not session.as_json:
        session.say(
            f"{answer.id}  tokens {distributions.num_rows}  logprob {number_text(total)}  perplexity {number_text(perplexity)}"
        )
        return
    document = {
        "id": answer.id,
        "start": distributions.start,
        "num_tokens": distributions.num_rows,
        "logprob": total,
        "perplexity": perplexity,
        "target_logprobs": distributions.target_logprobs.tolist(),
    }
    if distributions.token_ids.shape[1]:
        document |= distributions_as_json(distributions)
    if distributions.entropy is not None:
        document["entropy"] = distributions.entropy.tolist()
    session.emit(document)


def _summary(target_logprobs: Any) -> tuple[float, float]:
    import numpy as np

    total = float(np.sum(target_logprobs, dtype=np.float64))
    if not len(target_logprobs):
        return 0.0, 1.0
    with np.errstate(over="ignore"):
        return total, float(np.exp(-np.float64(total) / len(target_logprobs)))
