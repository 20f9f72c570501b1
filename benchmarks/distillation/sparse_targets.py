"""Cost of sparse targets: the share of full distillation's gain over cross-entropy that each form keeps, at equal
bytes.

Trains a small teacher on a text file in this process, then students of several seeds with each form; start, rows and
order are shared within a seed. The metric is the divergence that is trained, at its temperature, over the complete
vocabulary on held-out text. A form's gain is its student's over cross-entropy's; shares are of the full form's gain.
Bytes count ids of 18 bits, as for a vocabulary of 151,936, and float16 log-probabilities; those of stratified draws are
what the wire took, with ids of the benchmark's vocabulary. Every student's results are kept in the work folder, so that
seeds, divergences and temperatures may be run in parts.

A second table, of forward KL at temperature 1 along the full student's training: the cosine of each form's gradient with
the full one, and the share of positions and steps in which a truncated, unnormalised loss is clamped at 0.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.distillation.held_out_metrics import gradient_cosines, held_out_metrics, truncated_kl
from benchmarks.distillation.report import paired_interval
from benchmarks.distillation.small_teacher import (
    Setting,
    batches,
    make_model,
    make_optimizer,
    open_setting,
    take_step,
)
from stillhouse.protos.tensors.distributions import (
    Distributions,
    decode_distributions,
    encode_distributions,
    packed_bits,
)
from stillhouse.student_trainer.config.rules.loss import TAIL_TARGETS, needs_draw_logprobs, why_no_tail_draws
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.config.target_choice import (
    DRAW_LOGPROB_BITS,
    TargetChoice,
    suits_plain_draws,
)
from stillhouse.student_trainer.train.batching.target_forms import TargetForm, target_rows
from stillhouse.student_trainer.train.loss.fused import OutputLayer, fused_objective
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.loss.sparse import DenseTargets, SparseTargets
from stillhouse.teacher_service.distributions.draws import sampled_ids

ID_BITS, LOGPROB_BITS = 18, 16
Kind = Literal[
    "cross_entropy",
    "full",
    "tail_bucket",
    "sampled",
    "top_k_and_sampled",
    "sampled_tail",
    "stratified_tail",
    "renormalise",
]
GRADIENTS_EVERY = 20
"""Steps between two comparisons of gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """Form of the training targets."""

    kind: Kind
    top_k: int = 0
    num_samples: int = 0

    @property
    def num_bytes(self) -> float:
        """Bytes of one token's target; its tail and the text's own token take 8 more. NaN where they depend on the text."""
        if self.kind == "stratified_tail":
            return math.nan
        draw_bits = ID_BITS + LOGPROB_BITS if self.kind == "sampled_tail" else ID_BITS
        return (self.top_k * (ID_BITS + LOGPROB_BITS) + self.num_samples * draw_bits) / 8

    def suits(self, loss: LossConfig) -> bool:
        """True if the form goes with the loss."""
        if self.kind in TAIL_TARGETS:
            return not any(why_no_tail_draws(term) for term in loss.terms)
        return self.kind in ("cross_entropy", "full", "tail_bucket") or suits_plain_draws(loss)

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
    Form(kind="top_k_and_sampled", top_k=16, num_samples=90),
    Form(kind="sampled_tail", top_k=16, num_samples=48),
    Form(kind="stratified_tail", top_k=16),
)
"""0 draws of stratified_tail are as many as `auto` takes."""


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
@click.option("--form", "forms", multiple=True, help="kind:k:n; default: three of at most 272 bytes.")
@click.option("--divergence", "divergences", multiple=True, default=["forward_kl"], show_default=True)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=[1.0], show_default=True)
@click.option("--sharpness", default=1.0, show_default=True, help="Factor of the teacher's logits.")
@click.option(
    "--gradients/--no-gradients", default=True, help="Compare gradients along the first full student."
)
@click.option("--vocabulary", default=4096, show_default=True)
@click.option("--teacher-steps", default=600, show_default=True)
@click.option("--steps", default=300, show_default=True, help="Steps of each student.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--student-batch", default=4, show_default=True, help="Rows of 128 tokens in a step.")
@click.option("--teacher-width", default=256, show_default=True)
@click.option("--student-width", default=128, show_default=True)
def main(
    *,
    text: Path,
    work_dir: Path,
    json_file: Path | None,
    forms: Sequence[str],
    divergences: Sequence[str],
    temperatures: Sequence[float],
    sharpness: float,
    gradients: bool,
    seeds: int,
    **sizes: int,
) -> None:
    """Measure the forms."""
    console = Console()
    torch.set_num_threads(1)
    setting = open_setting(text, work_dir, sizes, sharpness)
    content: dict[str, Any] = {"sizes": sizes, "sharpness": sharpness, "losses": {}}
    for divergence, temperature in itertools.product(divergences, temperatures):
        loss = LossConfig(terms=(LossTermConfig(divergence=divergence),), temperature=temperature)
        chosen = [form for form in (*map(_form, forms), *(() if forms else FORMS)) if form.suits(loss)]
        chosen = [CROSS_ENTROPY, FULL, *(_settled(form, loss, sizes["vocabulary"]) for form in chosen)]
        found: dict[Form, list[Mapping[str, float]]] = {form: [] for form in chosen}
        for seed in range(seeds):
            for form, metrics in _students(setting, chosen, seed, loss).items():
                found[form].append(metrics)
                console.print(f"seed {seed}: {form}: {metrics['divergence']:.4f}", highlight=False)
        name = f"{divergence} at temperature {temperature:g}"
        content["losses"][name] = _show(console, name, found)
        if json_file is not None:
            json_file.write_text(json.dumps(content, indent=2) + "\n")
    if gradients:
        content["gradients"] = _compare_gradients(setting, console)
        if json_file is not None:
            json_file.write_text(json.dumps(content, indent=2) + "\n")


def _settled(form: Form, loss: LossConfig, vocabulary: int) -> Form:
    """The form, with as many draws as `auto` takes where it names none."""
    if form.kind != "stratified_tail" or form.num_samples:
        return form
    own = replace(loss, top_k=form.top_k)
    choice = TargetChoice.draws(own, "", form=form.kind, vocab_size=vocabulary)
    return replace(form, num_samples=choice.num_samples)


def _show(console: Console, name: str, found: Mapping[Form, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Prints the table of one loss; its content."""
    values = {form: [each["divergence"] for each in metrics] for form, metrics in found.items()}
    table = Table(
        *("form", "bytes a token", "held-out divergence", "share of the gain", "95 %"),
        *("KL", "accepted", "ECE"),
        title=name,
    )
    content: dict[str, Any] = {}
    for form, metrics in found.items():
        mean, half = _shares(values, form)
        means = {key: statistics.mean(each[key] for each in metrics) for key in metrics[0]}
        table.add_row(
            *(
                str(form),
                f"{means.get('bytes', form.num_bytes):.0f}",
                f"{means['divergence']:.4f}",
                f"{mean:.1%}",
                f"± {half:.1%}",
            ),
            *(f"{means['kl']:.4f}", f"{means['accepted']:.3f}", f"{means['ece']:.3f}"),
        )
        num_bytes = means.get("bytes", form.num_bytes)
        content[str(form)] = {"bytes": num_bytes, "share": (mean, half), "seeds": list(metrics)}
    console.print(table)
    return content


def _students(
    setting: Setting, forms: Sequence[Form], seed: int, loss: LossConfig
) -> dict[Form, Mapping[str, float]]:
    """Held-out metrics of one student per form, trained together: the teacher scores a batch once."""
    sizes, name = setting.sizes, f"{loss.terms[0].divergence}-{loss.temperature:g}"
    files = {
        form: setting.results / f"{name}-{form.kind}-{form.top_k}-{form.num_samples}-{seed}.json"
        for form in forms
    }
    students = {}
    for form in (form for form, file in files.items() if not file.exists()):
        torch.manual_seed(seed)
        student = make_model(sizes["student_width"], 2, sizes["vocabulary"])
        draws = torch.Generator().manual_seed(1000 + seed)
        students[form] = (student, *make_optimizer(student, sizes["steps"]), draws)
    num_bytes: dict[Form, list[float]] = {form: [] for form in students}
    for batch, logprobs in batches(setting, seed) if students else ():
        for form, (student, optimizer, schedule, draws) in students.items():
            targets = None
            if form != CROSS_ENTROPY:
                targets = _targets(logprobs, form, draws, loss, num_bytes[form])
            summed = _loss(student, batch, targets, loss)
            take_step(summed / batch[:, 1:].numel(), student, optimizer, schedule)
    for form, (student, *_) in students.items():
        found = dict(held_out_metrics(setting.teacher, student, setting.held_out, loss))
        if num_bytes[form]:
            found["bytes"] = statistics.mean(num_bytes[form])
        files[form].write_text(json.dumps(found))
    return {form: json.loads(file.read_text()) for form, file in files.items()}


def _compare_gradients(setting: Setting, console: Console) -> dict[str, Any]:
    """Cosines of the forms' gradients with the full one along a full student, and how often a truncated loss is clamped."""
    torch.manual_seed(0)
    loss, student = LossConfig(), make_model(setting.sizes["student_width"], 2, setting.sizes["vocabulary"])
    optimizer, schedule = make_optimizer(student, setting.sizes["steps"])
    draws = torch.Generator().manual_seed(1000)
    cosines: dict[str, list[float]] = {}
    positions_below, steps_below = [], []
    for step, (batch, logprobs) in enumerate(batches(setting, 0)):
        full = _targets(logprobs, FULL, draws, loss)
        if step % GRADIENTS_EVERY == 0:
            log_q = student(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            truncated, below = truncated_kl(log_q.detach(), logprobs, 64, clamp=False)
            positions_below.append(float(below))
            steps_below.append(float(truncated < 0))
            losses: dict[str, Callable[[], Tensor]] = {
                str(form): partial(_loss, student, batch, _targets(logprobs, form, draws, loss), loss)
                for form in (_settled(each, loss, setting.sizes["vocabulary"]) for each in FORMS)
            }
            for clamp, name in ((False, "truncated k=64"), (True, "truncated k=64, clamped")):
                losses[name] = partial(_truncated, student, batch, logprobs, clamp=clamp)
            found = gradient_cosines(
                list(student.parameters()), partial(_loss, student, batch, full, loss), losses
            )
            for name, cosine in found.items():
                cosines.setdefault(name, []).append(cosine)
        summed = _loss(student, batch, full, loss)
        take_step(summed / batch[:, 1:].numel(), student, optimizer, schedule)
    table = Table("form", "cosine with the full gradient: mean", "least", title="gradients")
    for name, values in cosines.items():
        table.add_row(name, f"{statistics.mean(values):.3f}", f"{min(values):.3f}")
    console.print(table)
    clamped = {
        "positions": statistics.mean(positions_below),
        "steps": statistics.mean(steps_below),
    }
    console.print(
        f"truncated, unnormalised loss of the top 64: below 0, and so clamped, at {clamped['positions']:.1%} of positions and, "
        f"as a sum, in {clamped['steps']:.1%} of {len(steps_below)} steps",
        highlight=False,
    )
    return {"cosines": cosines, "clamped": clamped}


def _truncated(model: Any, batch: Tensor, logprobs: Tensor, *, clamp: bool) -> Tensor:
    log_q = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    return truncated_kl(log_q, logprobs, 64, clamp=clamp)[0]


def _loss(
    model: Any, batch: Tensor, targets: DenseTargets | SparseTargets | None, loss: LossConfig
) -> Tensor:
    """Sum over the tokens of a batch."""
    if targets is None:
        loss = LossConfig(terms=(LossTermConfig(weight=0.0),), hard_weight=1.0)
    text = batch[:, 1:].reshape(1, -1)
    positions = Positions(target_ids=text, weights=torch.ones(text.shape), targets=targets)
    hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    return fused_objective(hidden, OutputLayer(weight=model.lm_head.weight), positions, loss).loss_sum


def _targets(
    logprobs: Tensor,
    form: Form,
    generator: torch.Generator,
    loss: LossConfig,
    num_bytes: list[float] | None = None,
) -> DenseTargets | SparseTargets:
    """Teacher targets of each next token, [N, V], in the given form, as a service sends them; appends their bytes a token."""
    if form.kind == "full":
        return DenseTargets(logprobs=logprobs.unsqueeze(0))
    temperature, vocab_size = loss.temperature, logprobs.shape[1]
    top = logprobs.topk(form.top_k, -1)
    tail = logprobs.scatter(-1, top.indices, -torch.inf)
    partition = None if temperature == 1 else (logprobs / temperature).logsumexp(-1)
    draws = draw_logprobs = None
    if form.kind == "stratified_tail":
        places = torch.rand(len(logprobs), 1, generator=generator, dtype=torch.float64)
        numbers = (torch.arange(form.num_samples) + places) / form.num_samples
        draws = sampled_ids(tail / temperature, numbers.numpy()).long()
        if needs_draw_logprobs(loss):
            draw_logprobs = logprobs.gather(-1, draws).numpy()
    elif form.num_samples:
        drawn = (tail / temperature).softmax(-1) if form.kind == "sampled_tail" else logprobs.exp()
        draws = torch.multinomial(drawn, form.num_samples, replacement=True, generator=generator)
        draw_logprobs = logprobs.gather(-1, draws).half().float().numpy()
    answer = Distributions(
        start=1,
        token_ids=top.indices.int().numpy(),
        logprobs=top.values.half().float().numpy(),
        target_logprobs=np.zeros(len(logprobs), np.float32),
        log_tail=tail.logsumexp(-1).numpy(),
        sampled_token_ids=None if draws is None else draws.int().numpy(),
        sampled_logprobs=draw_logprobs,
        log_partitions=None if partition is None else partition.unsqueeze(-1).numpy(),
    )
    if form.kind == "stratified_tail":
        bits = packed_bits(vocab_size)
        message = encode_distributions(
            answer, pack_bits=bits, sort_bits=bits, sampled_logprob_bits=DRAW_LOGPROB_BITS
        )
        parts = (message.token_ids, message.logprobs, message.sampled_token_ids, message.sampled_logprobs)
        if num_bytes is not None:
            num_bytes.append(sum(len(part.data) for part in parts) / len(logprobs))
        answer = decode_distributions(
            message, vocab_size=vocab_size, max_rows=len(logprobs), max_top_k=form.top_k
        )
    kind = cast("TargetForm", form.kind)
    found = target_rows(answer, np.arange(len(logprobs)), kind, temperature=temperature)
    shares = found.draw_shares
    return SparseTargets(
        token_ids=torch.from_numpy(found.token_ids).long().unsqueeze(0),
        logprobs=torch.from_numpy(found.logprobs).float().unsqueeze(0),
        log_tail=torch.from_numpy(found.log_tail).float().unsqueeze(0),
        log_partition=None if partition is None else partition.unsqueeze(0),
        draw_shares=None if shares is None else torch.from_numpy(shares).float().unsqueeze(0),
    )


def _shares(found: Mapping[Form, Sequence[float]], form: Form) -> tuple[float, float]:
    """Mean over seeds of (CE - form) / (CE - full), and half its 95 % interval (Student's t)."""
    every = zip(found[CROSS_ENTROPY], found[FULL], found[form], strict=True)
    shares = [(base - value) / (base - full) if base != full else math.nan for base, full, value in every]
    interval = paired_interval(shares, [0.0] * len(shares))
    return interval.mean, interval.high - interval.mean


if __name__ == "__main__":
    main()
