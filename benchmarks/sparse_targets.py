"""What sparse targets cost: the share of full-vocabulary distillation's gain over cross-entropy that each form keeps, at equal bytes.

Trains a small teacher on a text file in this process, then students of several seeds with each form; the same start,
rows and order within a seed. Measured is KL(teacher || student) over the whole vocabulary on held-out text. The gain of
a form is that of its student over cross-entropy's; shares are of the full form's gain. Bytes are those of ids with 18
bits, as of a vocabulary of 151,936, and float16 log-probabilities.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from protos.tensor_codec import Distributions
from student_trainer.config import LossConfig, LossTermConfig
from student_trainer.train.loss.fused import OutputLayer, Positions, fused_objective
from student_trainer.train.loss.sparse import DenseTargets, SparseTargets
from student_trainer.train.targets import TargetForm, target_rows

ID_BITS, LOGPROB_BITS = 18, 16
LENGTH, BATCH = 128, 8
Kind = Literal["cross_entropy", "full", "tail_bucket", "sampled", "top_k_and_sampled", "renormalise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What a student learns from."""

    kind: Kind
    top_k: int = 0
    num_samples: int = 0

    @property
    def num_bytes(self) -> float:
        """Of one token's target; the tail takes 4 more."""
        return (self.top_k * (ID_BITS + LOGPROB_BITS) + self.num_samples * ID_BITS) / 8

    def __str__(self) -> str:
        parts = [
            self.kind,
            f"k={self.top_k}" if self.top_k else "",
            f"n={self.num_samples}" if self.num_samples else "",
        ]
        return " ".join(part for part in parts if part)


FORMS = (
    Form(kind="cross_entropy"),
    Form(kind="full"),
    Form(kind="tail_bucket", top_k=64),
    Form(kind="sampled", num_samples=120),
    Form(kind="top_k_and_sampled", top_k=16, num_samples=90),
    Form(kind="top_k_and_sampled", top_k=32, num_samples=60),
)


@click.command()
@click.option(
    "--text", required=True, type=click.Path(path_type=Path, exists=True), help="UTF-8 text to learn."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what was found here.")
@click.option("--vocabulary", default=4096, show_default=True)
@click.option("--teacher-steps", default=600, show_default=True)
@click.option("--steps", default=300, show_default=True, help="Of each student.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--teacher-width", default=256, show_default=True)
@click.option("--student-width", default=96, show_default=True)
@click.option("--rows", default=0, help="Rows of the text that students learn from; 0 for all.")
def main(text: Path, json_file: Path | None, seeds: int, **options: int) -> None:
    """Measure the forms."""
    console = Console()
    train, held_out = _blocks(text, options["vocabulary"])
    torch.manual_seed(0)
    teacher = _model(options["teacher_width"], 4, options["vocabulary"])
    _train(teacher, None, train, Form(kind="cross_entropy"), options["teacher_steps"], seed=0)
    student_rows = train[: options["rows"] or len(train)]
    found: dict[Form, list[float]] = {form: [] for form in FORMS}
    for seed in range(seeds):
        for form in FORMS:
            torch.manual_seed(seed)
            student = _model(options["student_width"], 2, options["vocabulary"])
            _train(student, teacher, student_rows, form, options["steps"], seed=seed)
            found[form].append(_held_out_kl(teacher, student, held_out))
            console.print(f"seed {seed}: {form}: {found[form][-1]:.4f}")
    shares = {form: _shares(found, form) for form in FORMS}
    table = Table("form", "bytes a token", "held-out KL", "share of the gain", "95 %")
    for form in FORMS:
        mean, half = shares[form]
        table.add_row(
            *(str(form), f"{form.num_bytes:.0f}", f"{statistics.mean(found[form]):.4f}"),
            *(f"{mean:.1%}", f"± {half:.1%}"),
        )
    console.print(table)
    if json_file is not None:
        content = {str(form): {"kl": found[form], "share": shares[form]} for form in FORMS}
        json_file.write_text(json.dumps(content, indent=2) + "\n")


def _blocks(text: Path, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Rows of LENGTH ids of a byte-level BPE trained on the text; the last tenth is held out."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(text)], vocab_size=vocabulary, show_progress=False)
    ids = torch.tensor(tokenizer.encode(text.read_text()).ids)
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    num_held_out = max(1, min(len(rows) // 10, 64))
    return rows[:-num_held_out], rows[-num_held_out:]


def _model(width: int, num_layers: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(settings)


def _train(model: Any, teacher: Any, rows: Tensor, form: Form, steps: int, *, seed: int) -> None:
    """Steps of AdamW with a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    weight = 0.0 if form.kind == "cross_entropy" else 1.0
    loss = LossConfig(terms=(LossTermConfig(weight=weight),), hard_weight=1.0 - weight)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        text = batch[:, 1:].reshape(1, -1)
        positions = Positions(
            target_ids=text,
            weights=torch.ones(text.shape),
            targets=None if form.kind == "cross_entropy" else _targets(teacher, batch, form, generator),
        )
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        total = fused_objective(hidden, OutputLayer(weight=model.lm_head.weight), positions, loss)
        (total.loss_sum / text.numel()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _targets(
    teacher: Any, batch: Tensor, form: Form, generator: torch.Generator
) -> DenseTargets | SparseTargets:
    """What the teacher says of each next token, as the form has it."""
    with torch.no_grad():
        logprobs = teacher(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    if form.kind == "full":
        return DenseTargets(logprobs=logprobs.unsqueeze(0))
    top = logprobs.topk(form.top_k, -1)
    tail = logprobs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    draws = None
    if form.num_samples:
        draws = torch.multinomial(logprobs.exp(), form.num_samples, replacement=True, generator=generator)
    answer = Distributions(
        start=1,
        token_ids=top.indices.int().numpy(),
        logprobs=top.values.half().float().numpy(),
        target_logprobs=np.zeros(len(logprobs), np.float32),
        log_tail=tail.numpy(),
        sampled_token_ids=None if draws is None else draws.int().numpy(),
    )
    found = target_rows(answer, np.arange(len(logprobs)), cast("TargetForm", form.kind))
    return SparseTargets(
        token_ids=torch.from_numpy(found.token_ids).long().unsqueeze(0),
        logprobs=torch.from_numpy(found.logprobs).float().unsqueeze(0),
        log_tail=torch.from_numpy(found.log_tail).float().unsqueeze(0),
    )


def _held_out_kl(teacher: Any, student: Any, rows: Tensor) -> float:
    """Mean over tokens of KL(teacher || student) on the whole vocabulary, in nats."""
    total = 0.0
    with torch.no_grad():
        for batch in torch.split(rows, BATCH):
            log_p, log_q = (
                model(input_ids=batch, use_cache=False).logits[:, :-1].log_softmax(-1)
                for model in (teacher, student)
            )
            total += (log_p.exp() * (log_p - log_q)).sum().item()
    return total / (rows.shape[0] * (LENGTH - 1))


def _shares(found: dict[Form, list[float]], form: Form) -> tuple[float, float]:
    """Mean over seeds of (CE - form) / mean of (CE - full), and the half width of its 95 % interval (Student's t)."""
    base, full = found[FORMS[0]], found[FORMS[1]]
    gain = statistics.mean(base) - statistics.mean(full)
    if gain == 0:
        return math.nan, math.nan
    shares = [(b - f) / gain for b, f in zip(base, found[form], strict=True)]
    if len(shares) < 2:
        return shares[0], math.nan
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}.get(len(shares), 2.3)
    return statistics.mean(shares), t * statistics.stdev(shares) / math.sqrt(len(shares))


if __name__ == "__main__":
    main()
