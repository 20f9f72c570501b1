"""Trains a tokenizer and a small teacher from any text, into a Hugging Face directory; a part of the text is held out."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from tests.support.small_models import make_model, make_tokenizer

PIECE_CHARACTERS = 1000
TOKENIZER_TEXTS = 20_000
REPORT_EVERY_S = 10.0
MAX_HELD_OUT_DOCUMENTS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRecipe:
    """Sizes of the teacher and how it is trained."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    steps: int = 2000
    """Optimizer steps at most."""
    minutes: float | None = None
    """Training time at most; the learning rate falls by whichever of the two limits is nearer."""
    batch_size: int = 16
    """Rows of `sequence_tokens` tokens in a step."""
    sequence_tokens: int = 256
    """Tokens in a row of training; documents follow each other in a row, each ended by the end token."""
    max_sequence_tokens: int = 1024
    """Longest sequence that the teacher declares."""
    learning_rate: float = 2e-3
    bfloat16: bool = False
    """Computes under autocast to bfloat16, which is faster where the processor multiplies it natively."""
    held_out_fraction: float = 0.05
    """Share of the documents, at most 500 of them, that no step sees."""
    seed: int = 0


DEFAULTS = TeacherRecipe()


def train_teacher(
    documents: Sequence[str],
    directory: Path,
    recipe: TeacherRecipe,
    *,
    report: Callable[[str], None] = print,
) -> float:
    """Held-out perplexity of a teacher trained on `documents` and written to `directory`.

    Beside the model lies `held_out.jsonl` with the documents that it never saw. Raises `ValueError` for fewer than
    two documents.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train, held_out = split(documents, recipe)
    make_tokenizer(train[:TOKENIZER_TEXTS], directory, recipe.vocab_size)
    make_model(
        directory,
        tokenizer_dir=directory,
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        max_sequence_tokens=recipe.max_sequence_tokens,
        seed=recipe.seed,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    num_parameters = sum(weight.numel() for weight in model.parameters())
    report(
        f"teacher: {num_parameters / 1e6:.2f} M parameters, {len(tokenizer)} tokens, {len(train)} documents"
    )
    fit(model, Corpus.of(train, tokenizer), recipe, report)
    perplexity = held_out_perplexity(model, Corpus.of(held_out, tokenizer), recipe)
    report(f"teacher: held-out perplexity {perplexity:.3f}")
    model.cpu().save_pretrained(directory, safe_serialization=True)
    (directory / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    return perplexity


def split(documents: Sequence[str], recipe: TeacherRecipe) -> tuple[list[str], list[str]]:
    """(training, held-out) documents, shuffled by the recipe's seed."""
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} documents are too few: one to train on and one to hold out.")
    shuffled = list(documents)
    random.Random(recipe.seed).shuffle(shuffled)
    num_held_out = min(MAX_HELD_OUT_DOCUMENTS, max(1, int(len(shuffled) * recipe.held_out_fraction)))
    return shuffled[num_held_out:], shuffled[:num_held_out]


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Documents as one stream of tokens, each ended by the end token."""

    tokens: Tensor
    """int64 [N]."""
    starts: Tensor
    """int64 [D]: where each document begins."""

    @staticmethod
    def of(documents: Sequence[str], tokenizer: Any) -> Corpus:
        """The stream of `documents` in their order."""
        tokens: list[int] = []
        starts = []
        for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
            starts.append(len(tokens))
            tokens += [*ids, tokenizer.eos_token_id]
        return Corpus(tokens=torch.tensor(tokens), starts=torch.tensor(starts))

    def rows(self, starts: Tensor, num_tokens: int) -> Tensor:
        """int64 [B, num_tokens] from each of `starts` [B] on; the stream begins again after its end."""
        return self.tokens[(starts[:, None] + torch.arange(num_tokens)) % len(self.tokens)]


def fit(model: nn.Module, corpus: Corpus, recipe: TeacherRecipe, report: Callable[[str], None]) -> None:
    """Trains `model` by next-token cross-entropy with AdamW and a cosine; every row begins where a document does."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    model.train()
    begin = reported = time.monotonic()
    for step in range(recipe.steps):
        elapsed_s = time.monotonic() - begin
        progress = max(step / recipe.steps, elapsed_s / (60 * recipe.minutes) if recipe.minutes else 0.0)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(step, progress)
        picks = corpus.starts[torch.randint(len(corpus.starts), (recipe.batch_size,), generator=generator)]
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            loss = cross_entropy(model, corpus.rows(picks, recipe.sequence_tokens + 1).to(device))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            report(f"teacher: step {step + 1}, {progress:4.0%}, loss {loss.item():.3f}")


def learning_rate_factor(step: int, progress: float, warmup_steps: int = 50) -> float:
    """Share of the peak learning rate: a linear rise over `warmup_steps`, a cosine down to a tenth."""
    return min(1.0, (step + 1) / warmup_steps) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def cross_entropy(model: nn.Module, rows_BT: Tensor) -> Tensor:
    """Scalar: mean over the B x (T - 1) predicted tokens, in nats."""
    logits_BTV = model(rows_BT[:, :-1]).logits.float()
    return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), rows_BT[:, 1:].flatten())


@torch.no_grad()
def held_out_perplexity(model: nn.Module, corpus: Corpus, recipe: TeacherRecipe) -> float:
    """exp of the mean cross-entropy over rows that begin with each held-out document."""
    model.eval()
    device = next(model.parameters()).device
    losses = [
        cross_entropy(model, corpus.rows(starts, recipe.sequence_tokens + 1).to(device)).item()
        for starts in torch.split(corpus.starts, recipe.batch_size)
    ]
    return math.exp(sum(losses) / len(losses))


def read_documents(path: Path, template: str) -> Iterator[str]:
    """Documents of a JSONL file, each row put into `template`, or of plain text, cut into pieces at line ends.

    Raises `ValueError` with the line for a row that is no JSON object or lacks a field of the template.
    """
    if path.suffix != ".jsonl":
        yield from pieces(path.read_text(encoding="utf-8"))
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield template.format_map(json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: {error!r} while the row was put into {template!r}; name its fields with --template."
                ) from error


def pieces(text: str) -> Iterator[str]:
    """Parts of `text` that end with a line, each of about 1,000 characters."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option("--template", default="{text}", show_default=True, help="How a JSONL row becomes text.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--vocab-size", default=DEFAULTS.vocab_size, show_default=True)
@click.option("--hidden-size", default=DEFAULTS.hidden_size, show_default=True)
@click.option("--layers", "num_layers", default=DEFAULTS.num_layers, show_default=True)
@click.option("--heads", "num_heads", default=DEFAULTS.num_heads, show_default=True)
@click.option("--steps", default=DEFAULTS.steps, show_default=True)
@click.option("--minutes", type=float, default=None, help="Training time at most.")
@click.option("--batch-size", default=DEFAULTS.batch_size, show_default=True)
@click.option("--sequence-tokens", default=DEFAULTS.sequence_tokens, show_default=True)
@click.option("--max-sequence-tokens", default=DEFAULTS.max_sequence_tokens, show_default=True)
@click.option("--learning-rate", default=DEFAULTS.learning_rate, show_default=True)
@click.option("--held-out-fraction", default=DEFAULTS.held_out_fraction, show_default=True)
@click.option("--seed", default=DEFAULTS.seed, show_default=True)
def main(*, data: Path, template: str, out: Path, **recipe: Any) -> None:
    """Train a small teacher on the text of a file."""
    try:
        train_teacher(list(read_documents(data, template.replace("\\n", "\n"))), out, TeacherRecipe(**recipe))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
