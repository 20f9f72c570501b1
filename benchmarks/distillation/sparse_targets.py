"""Cost of sparse targets: the share of full distillation's gain over cross-entropy that each form keeps, at equal
bytes.

Trains a small teacher on a text file in this process, then students of several seeds with each form; start, rows and
order are shared within a seed. The metric is KL(teacher || student) over the complete vocabulary on held-out text. A
form's gain is its student's over cross-entropy's; shares are of the full form's gain. Bytes count ids of 18 bits, as
for a vocabulary of 151,936, and float16 log-probabilities.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.distillation.report import paired_interval
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.batching.target_forms import TargetForm, target_rows
from stillhouse.student_trainer.train.loss.fused import OutputLayer, fused_objective
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.loss.sparse import DenseTargets, SparseTargets

ID_BITS, LOGPROB_BITS = 18, 16
LENGTH, TEACHER_BATCH = 128, 8
Kind = Literal["cross_entropy", "full", "tail_bucket", "sampled", "top_k_and_sampled", "renormalise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """Form of the training targets."""

    kind: Kind
    top_k: int = 0
    num_samples: int = 0

    @property
    def num_bytes(self) -> float:
        """Bytes of one token's target; its tail and the text's own token take 8 more."""
        return (self.top_k * (ID_BITS + LOGPROB_BITS) + self.num_samples * ID_BITS) / 8

    def __str__(self) -> str:
        parts = [
            self.kind,
            f"k={self.top_k}" if self.top_k else "",
            f"n={self.num_samples}" if self.num_samples else "",
        ]
        return " ".join(part for part in parts if part)


CROSS_ENTROPY, FULL = Form(kind="cross_entropy"), Form(kind="full")
FORMS = (
    Form(kind="tail_bucket", top_k=64),
    Form(kind="sampled", top_k=1, num_samples=119),
    Form(kind="sampled", top_k=1, num_samples=50),
    Form(kind="top_k_and_sampled", top_k=16, num_samples=90),
    Form(kind="top_k_and_sampled", top_k=32, num_samples=60),
)


def _form(text: str) -> Form:
    """Parses a form of the option: kind:k:n."""
    kind, top_k, num_samples = text.split(":")
    if kind not in get_args(Kind):
        raise click.BadParameter(f"{kind!r} is none of {', '.join(get_args(Kind))}.")
    return Form(kind=cast("Kind", kind), top_k=int(top_k), num_samples=int(num_samples))


@click.command()
@click.option(
    "--text", required=True, type=click.Path(path_type=Path, exists=True), help="UTF-8 training text."
)
@click.option(
    "--work-dir", required=True, type=click.Path(path_type=Path), help="Work folder; name it again to resume."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="JSON file of results.")
@click.option("--form", "forms", multiple=True, help="kind:k:n; default: five of at most 272 bytes.")
@click.option("--vocabulary", default=4096, show_default=True)
@click.option("--teacher-steps", default=600, show_default=True)
@click.option("--steps", default=300, show_default=True, help="Steps of each student.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--student-batch", default=4, show_default=True, help="Rows of 128 tokens in a step.")
@click.option("--teacher-width", default=256, show_default=True)
@click.option("--student-width", default=128, show_default=True)
def main(
    text: Path, work_dir: Path, json_file: Path | None, forms: Sequence[str], seeds: int, **sizes: int
) -> None:
    """Measure the forms."""
    console = Console()
    torch.set_num_threads(1)
    chosen = [CROSS_ENTROPY, FULL, *(map(_form, forms) if forms else FORMS)]
    found: dict[Form, list[float]] = {form: [] for form in chosen}
    setting = _setting(text, work_dir, sizes)
    for seed in range(seeds):
        for form, kl in _students(setting, chosen, seed).items():
            found[form].append(kl)
            console.print(f"seed {seed}: {form}: {kl:.4f}", highlight=False)
    shares = {form: _shares(found, form) for form in chosen}
    table = Table("form", "bytes a token", "held-out KL", "share of the gain", "95 %")
    for form in chosen:
        mean, half = shares[form]
        table.add_row(
            *(str(form), f"{form.num_bytes:.0f}", f"{statistics.mean(found[form]):.4f}"),
            *(f"{mean:.1%}", f"± {half:.1%}"),
        )
    console.print(table)
    if json_file is not None:
        content = {
            str(form): {"bytes": form.num_bytes, "kl": found[form], "share": shares[form]} for form in chosen
        }
        json_file.write_text(json.dumps({"sizes": sizes, "forms": content}, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Settings shared by students of all seeds and forms."""

    teacher: Any
    train: Tensor
    held_out: Tensor
    results: Path
    """Folder with one file per student."""
    sizes: Mapping[str, int]


def _setting(text: Path, work_dir: Path, sizes: Mapping[str, int]) -> Setting:
    """Trains the teacher, once per work folder."""
    train, held_out = _blocks(text, sizes["vocabulary"])
    torch.manual_seed(0)
    teacher = _model(sizes["teacher_width"], 4, sizes["vocabulary"])
    path = work_dir / "teacher-{teacher_width}-{vocabulary}-{teacher_steps}.pt".format(**sizes)
    results = path.with_suffix("") / "students-{student_width}-{student_batch}-{steps}".format(**sizes)
    results.mkdir(parents=True, exist_ok=True)
    if path.exists():
        teacher.load_state_dict(torch.load(path, weights_only=True))
    else:
        optimizer, schedule = _optimizer(teacher, sizes["teacher_steps"])
        generator = torch.Generator().manual_seed(0)
        for _ in range(sizes["teacher_steps"]):
            batch = train[torch.randint(len(train), (TEACHER_BATCH,), generator=generator)]
            _step(teacher, batch, None, optimizer, schedule)
        torch.save(teacher.state_dict(), path)
    return Setting(teacher=teacher, train=train, held_out=held_out, results=results, sizes=sizes)


def _students(setting: Setting, forms: Sequence[Form], seed: int) -> dict[Form, float]:
    """Held-out KL of one student per form, trained together: the teacher scores a batch once."""
    sizes, train = setting.sizes, setting.train
    files = {
        form: setting.results / f"{form.kind}-{form.top_k}-{form.num_samples}-{seed}.json" for form in forms
    }
    students = {}
    for form in (form for form, file in files.items() if not file.exists()):
        torch.manual_seed(seed)
        student = _model(sizes["student_width"], 2, sizes["vocabulary"])
        draws = torch.Generator().manual_seed(1000 + seed)
        students[form] = (student, *_optimizer(student, sizes["steps"]), draws)
    rows = torch.Generator().manual_seed(seed)
    for _ in range(sizes["steps"] if students else 0):
        batch = train[torch.randint(len(train), (sizes["student_batch"],), generator=rows)]
        with torch.no_grad():
            logits = setting.teacher(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            logprobs = logits.log_softmax(-1)
        for form, (student, optimizer, schedule, draws) in students.items():
            targets = None if form == CROSS_ENTROPY else _targets(logprobs, form, draws)
            _step(student, batch, targets, optimizer, schedule)
    for form, (student, *_) in students.items():
        files[form].write_text(json.dumps(_held_out_kl(setting.teacher, student, setting.held_out)))
    return {form: json.loads(file.read_text()) for form, file in files.items()}


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


def _optimizer(model: Any, steps: int) -> tuple[Any, Any]:
    """AdamW with a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)


def _step(
    model: Any, batch: Tensor, targets: DenseTargets | SparseTargets | None, optimizer: Any, schedule: Any
) -> None:
    """Takes one step towards the targets, or the text without targets."""
    weight = 0.0 if targets is None else 1.0
    loss = LossConfig(terms=(LossTermConfig(weight=weight),), hard_weight=1.0 - weight)
    text = batch[:, 1:].reshape(1, -1)
    positions = Positions(target_ids=text, weights=torch.ones(text.shape), targets=targets)
    hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    total = fused_objective(hidden, OutputLayer(weight=model.lm_head.weight), positions, loss)
    (total.loss_sum / text.numel()).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def _targets(logprobs: Tensor, form: Form, generator: torch.Generator) -> DenseTargets | SparseTargets:
    """Teacher targets of each next token, [N, V], in the given form."""
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
    """Mean over tokens of KL(teacher || student) over the complete vocabulary, in nats."""
    total = 0.0
    with torch.no_grad():
        for batch in torch.split(rows, 8):
            log_p, log_q = (
                model(input_ids=batch, use_cache=False).logits[:, :-1].log_softmax(-1)
                for model in (teacher, student)
            )
            total += (log_p.exp() * (log_p - log_q)).sum().item()
    return total / (rows.shape[0] * (LENGTH - 1))


def _shares(found: Mapping[Form, Sequence[float]], form: Form) -> tuple[float, float]:
    """Mean over seeds of (CE - form) / (CE - full), and half its 95 % interval (Student's t)."""
    every = zip(found[CROSS_ENTROPY], found[FULL], found[form], strict=True)
    shares = [(base - value) / (base - full) if base != full else math.nan for base, full, value in every]
    interval = paired_interval(shares, [0.0] * len(shares))
    return interval.mean, interval.high - interval.mean


if __name__ == "__main__":
    main()
