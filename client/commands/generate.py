"""`stillhouse generate`: streams the teacher's completions, or runs a batch from file to file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stillhouse.client.terminal.finite_float import FiniteFloat
from stillhouse.client.terminal.session import Session, command
from stillhouse.protos.rows.known_fields import EXTRA_FIELDS

if TYPE_CHECKING:
    from stillhouse.client.teacher.generate import Completion, Prompt
    from stillhouse.protos.tensors.distributions import Distributions


@command(name="generate")
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "--file", "files", multiple=True, metavar="FILE", help='File with one prompt; "-" is standard input.'
)
@click.option(
    "--chat",
    is_flag=True,
    help="Prompts are conversations: text of a user, or JSON messages in --file or --in.",
)
@click.option(
    "-n", "--num-samples", type=click.IntRange(1), default=1, show_default=True, help="Samples per prompt."
)
@click.option("--temperature", type=FiniteFloat(0), default=None, help="0 is greedy.  [default: 1]")
@click.option("--top-p", type=FiniteFloat(0, 1, min_open=True), default=None, help="[default: 1]")
@click.option(
    "--top-k", type=click.IntRange(0), default=None, help="Sample from the top-k tokens; 0 means all."
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=None, help="[default: 256]")
@click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends a sample; may be repeated.")
@click.option("--seed", type=int, default=None, help="Fixes the text of each sample.")
@click.option("--adapter", default="", help="Adapter to apply.")
@click.option(
    "--date",
    metavar="DAY",
    type=click.DateTime(["%Y-%m-%d"]),
    default=None,
    help="Day that the chat template is told, such as 2025-01-31.  [default: today, of a batch that of its begin]",
)
@click.option(
    "--top-k-logprobs",
    type=click.IntRange(0),
    default=0,
    help="Top-k tokens to report per position, by id and text.",
)
@click.option("--in", "source", type=click.Path(path_type=Path), help="Complete each row of this JSONL file.")
@click.option("--out", type=click.Path(path_type=Path), help="Output file of --in.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["auto", "plain", "openai"]),
    default="auto",
    help="Format of --in: Stillhouse's rows or OpenAI's batch files.  [default: by its first row]",
)
@click.option(
    "--as",
    "output",
    type=click.Choice(["rows", "dataset"]),
    default="rows",
    help="Write the input's format, or training data.  [default: rows]",
)
@click.option(
    "--extra-fields",
    type=click.Choice(EXTRA_FIELDS),
    default="keep",
    help="Copy fields that no row has to --out, or refuse their rows.  [default: keep]",
)
@click.option(
    "--capture",
    type=click.Path(path_type=Path),
    help="Cache the teacher's distributions of the completions here; --top-k-logprobs tokens each, or 64.",
)
@click.option("--retry-failed", is_flag=True, help="Retry the failed rows of --out.")
@click.option("--overwrite", is_flag=True, help="Start --out from scratch, whatever it holds.")
@click.option(
    "--max-inflight",
    type=click.IntRange(1),
    default=None,
    help="Samples in flight.  [default: 1024]",
)
def generate(
    session: Session,
    *,
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    chat: bool,
    source: Path | None,
    out: Path | None,
    file_format: str,
    output: str,
    extra_fields: str,
    capture: Path | None,
    retry_failed: bool,
    overwrite: bool,
    max_inflight: int | None,
    date: datetime | None,
    **options: Any,
) -> int:
    """Complete each PROMPT with the teacher, or each row of a file.

    Without PROMPT, --file and --in the prompt is read from standard input. A single sample is streamed, several are shown
    as they finish. With --json each finished sample is one line.

    With --in FILE --out FILE each row is completed, in order. A row is a JSON object with `prompt`, `messages` or
    `token_ids`, and optionally `system`, `tools`, `chat_template_kwargs`, `id`, `temperature`, `top_p`, `top_k`, `max_new_tokens`, `seed`, `stop`,
    `num_samples` and `adapter`; or a row of OpenAI's batch format, whose `model` may name an adapter. The chat template is
    applied to messages, and to a prompt beside `system` or `tools` or with --chat. The same command resumes a killed batch.
    A failed row is reported in --out, and the exit code is 1.
    """
    from stillhouse.client.terminal.prompt_input import chat_prompts, text_prompts

    day = "" if date is None else date.date().isoformat()
    for_files = (out, capture, retry_failed, overwrite, max_inflight, file_format != "auto", output != "rows")
    if source is None and (any(for_files) or extra_fields != "keep"):
        raise click.UsageError(
            "--out, --format, --as, --extra-fields, --capture, --retry-failed, --overwrite and --max-inflight need --in FILE."
        )
    if source is not None:
        if prompts or files or out is None:
            raise click.UsageError("--in FILE needs --out FILE, and excludes PROMPT and --file.")
        from stillhouse.client.commands.generate_file import run_batch

        flags = {"retry_failed": retry_failed, "overwrite": overwrite, "as_dataset": output == "dataset"}
        flags["chat"] = chat
        return run_batch(
            session,
            source,
            out,
            options,
            format=file_format,
            extra_fields=extra_fields,
            capture=capture,
            max_inflight=max_inflight,
            date=day,
            **flags,
        )

    options["date"] = day
    if not prompts and not files:
        if sys.stdin.isatty():
            raise click.UsageError("give a PROMPT, --file FILE, or text on standard input.")
        files = ("-",)
    inputs = (chat_prompts if chat else text_prompts)(prompts, files)
    if session.as_json or len(inputs) * options["num_samples"] > 1:
        return _several(session, inputs, options)
    return _one(session, inputs, options)


def _one(session: Session, prompts: list[Prompt], options: dict[str, Any]) -> int:
    from stillhouse.client.teacher.generate import Gathering
    from stillhouse.client.terminal.render import printable

    gathering = Gathering()
    for piece in session.teacher.generate(prompts, **options):
        sys.stdout.write(printable(piece.text) if sys.stdout.isatty() else piece.text)
        sys.stdout.flush()
        whole = gathering.add(piece)
        if whole is not None:
            sys.stdout.write("\n")
            _show_top(session, whole, _texts(session, options))
            if whole.error is not None:
                raise whole.error
    return 0


def _several(session: Session, prompts: list[Prompt], options: dict[str, Any]) -> int:
    failed = 0
    texts = _texts(session, options)
    for completion in session.teacher.complete(prompts, **options):
        failed += completion.error is not None
        if session.as_json:
            session.emit(_as_json(completion, texts))
            continue
        session.say(f"--- prompt {completion.prompt_index}, sample {completion.sample_index}")
        session.say(completion.text if completion.error is None else f"Error: {completion.error.message}")
        _show_top(session, completion, texts)
    return 1 if failed else 0


def _texts(session: Session, options: dict[str, Any]) -> Callable[[int], str] | None:
    """Returns the text of a token by its id; None if no top-k tokens are shown, or the teacher's tokenizer has no texts."""
    from stillhouse.client.batch.output_formats import TokenTexts
    from stillhouse.protos.errors import StillhouseError

    if not options["top_k_logprobs"]:
        return None
    try:
        return TokenTexts(session.teacher.tokenizer().get("tokenizer.json", b"")).text
    except StillhouseError as error:
        session.note(f"{error.message} Tokens are shown by their ids.")
        return None


def _as_json(completion: Completion, texts: Callable[[int], str] | None) -> dict[str, Any]:
    from stillhouse.client.core.json_output import error_as_json

    drawn = completion.sampling_logprobs
    document: dict[str, Any] = {
        "prompt_index": completion.prompt_index,
        "sample_index": completion.sample_index,
        "text": completion.text,
        "token_ids": completion.token_ids.tolist(),
        "sampling_logprobs": None if drawn is None else drawn.tolist(),
        "finish_reason": completion.finish or None,
        "prompt_tokens": completion.prompt_tokens,
    }
    if completion.distributions is not None:
        document |= distributions_as_json(completion.distributions)
        if texts is not None:
            top_ids = document["top_token_ids"]
            document["tokens"] = [texts(each) for each in document["token_ids"]]
            document["top_tokens"] = [[texts(each) for each in position] for position in top_ids]
    if completion.error is not None:
        document["error"] = error_as_json(completion.error)
    return document


def distributions_as_json(distributions: Distributions) -> dict[str, Any]:
    """Returns the top-k tokens of each position, and the log-probability of the others."""
    return {
        "top_token_ids": distributions.token_ids.tolist(),
        "top_logprobs": distributions.logprobs.tolist(),
        "log_tail": distributions.log_tail.tolist(),
    }


def _show_top(session: Session, completion: Completion, texts: Callable[[int], str] | None) -> None:
    from stillhouse.client.terminal.render import columns, number_text

    distributions = completion.distributions
    if distributions is None or distributions.token_ids.shape[1] == 0:
        return

    def shown(token: int) -> str:
        return str(token) if texts is None else f"{token} {texts(token)!r}"

    rows = [
        (
            shown(token),
            *(
                f"{shown(other)}: {number_text(logprob)}"
                for other, logprob in zip(ids, logprobs, strict=True)
            ),
        )
        for token, ids, logprobs in zip(
            completion.token_ids.tolist(),
            distributions.token_ids.tolist(),
            distributions.logprobs.tolist(),
            strict=True,
        )
    ]
    header = ("token", *(f"top {rank + 1}" for rank in range(distributions.token_ids.shape[1])))
    session.say(columns(rows, header=header))
