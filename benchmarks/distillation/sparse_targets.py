"""Cost of sparse targets: the share of full distillation's gain over cross-entropy that each form keeps, at equal
bytes.

Trains a small teacher on a text file in this process, then students of several seeds with each form; start, rows and
order are shared within a seed. The metric is the divergence that is trained, at its temperature, over the complete
vocabulary on held-out text. A form's gain is its student's over cross-entropy's; shares are of the full form's gain.
Bytes count ids of 18 bits, as for a vocabulary of 151,936, and float16 log-probabilities; those of stratified draws are
what the wire took, with ids of the benchmark's vocabulary. Every student's results are kept in the work folder, so that
seeds, divergences and temperatures may be run in parts.

The default setting stands for a run as a run file without an optimizer section makes it: 8 rows in a step
(optimizer.batch_size), here of 128 tokens, under a cosine schedule, and a student that was trained before, here by 150 steps
of cross-entropy on other rows. 150 steps are few for such a run; more of them, or larger batches, average more of the draws'
noise. Models are narrow, so that a seed takes minutes of one core; with a vocabulary of 32,000 take half the widths.

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
from typing import Any, cast, get_args

import click
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
    training_rows,
)
from benchmarks.distillation.sparse_forms import (
    CROSS_ENTROPY,
    FORMS,
    FULL,
    Form,
    Kind,
    settled,
    summed_loss,
    targets_of,
)
from stillhouse.student_trainer.config.rules.loss import takes_draw_logprobs
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.loss.sparse import DenseTargets, SparseTargets
from stillhouse.student_trainer.train.loss.workspace import Workspace

GRADIENTS_EVERY = 20
"""Steps between two comparisons of gradients."""


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
@click.option("--teacher-steps", default=300, show_default=True)
@click.option("--steps", default=150, show_default=True, help="Steps of each student.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--first-seed", default=0, show_default=True)
@click.option(
    "--warm-steps",
    default=150,
    show_default=True,
    help="Steps of cross-entropy that each student has behind it, as a student that was trained before.",
)
@click.option("--student-batch", default=8, show_default=True, help="Rows of 128 tokens in a step.")
@click.option("--held-out-rows", default=64, show_default=True, help="At most 64.")
@click.option("--teacher-width", default=128, show_default=True)
@click.option("--student-width", default=64, show_default=True)
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
    first_seed: int,
    **sizes: int,
) -> None:
    """Measure the forms."""
    console = Console()
    torch.set_num_threads(1)
    setting = open_setting(text, work_dir, sizes, sharpness)
    content: dict[str, Any] = {"sizes": sizes, "sharpness": sharpness, "losses": {}}
    chosen: dict[str, tuple[LossConfig, list[Form]]] = {}
    for divergence, temperature in itertools.product(divergences, temperatures):
        loss = LossConfig(terms=(LossTermConfig(divergence=divergence),), temperature=temperature)
        suited = [form for form in (*map(_form, forms), *(() if forms else FORMS)) if form.suits(loss)]
        suited = [CROSS_ENTROPY, FULL, *(settled(form, loss, sizes["vocabulary"]) for form in suited)]
        chosen[f"{divergence} at temperature {temperature:g}"] = loss, suited
    found: dict[str, dict[Form, list[Mapping[str, float]]]] = {
        name: {form: [] for form in suited} for name, (_, suited) in chosen.items()
    }
    for seed in range(first_seed, first_seed + seeds):
        for (name, form), metrics in _students(setting, chosen, seed).items():
            found[name][form].append(metrics)
            console.print(f"seed {seed}: {name}: {form}: {metrics['divergence']:.4f}", highlight=False)
        for name in chosen:
            content["losses"][name] = _show(console, name, found[name])
        if json_file is not None:
            json_file.write_text(json.dumps(content, indent=2) + "\n")
    if gradients:
        content["gradients"] = _compare_gradients(setting, console)
        if json_file is not None:
            json_file.write_text(json.dumps(content, indent=2) + "\n")


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
    setting: Setting, chosen: Mapping[str, tuple[LossConfig, Sequence[Form]]], seed: int
) -> dict[tuple[str, Form], Mapping[str, float]]:
    """Held-out metrics of one student per loss and form, trained together: the teacher scores a batch once.

    Cross-entropy's student is the same for all losses.
    """
    files = {
        (name, form): setting.results
        / f"{_file_name(loss)}-{form.kind}-{form.top_k}-{form.num_samples}-{seed}.json"
        for name, (loss, forms) in chosen.items()
        for form in forms
    }
    missing = [key for key, file in files.items() if not file.exists()]
    start = _warm_state(setting, seed) if missing else {}
    students = {key: _Student.new(setting, seed, start) for key in missing if key[1] != CROSS_ENTROPY}
    baseline = _Student.new(setting, seed, start) if len(students) < len(missing) else None
    drawn = _SharedTargets(1000 + seed)
    for batch, logprobs in batches(setting, seed) if missing else ():
        if baseline is not None:
            baseline.step(batch, None, LossConfig())
        for (name, form), student in students.items():
            loss = chosen[name][0]
            student.step(batch, drawn.of(logprobs, form, loss), loss)
        drawn.forget()
    for name, form in missing:
        trained = students.get((name, form)) or baseline
        assert trained is not None
        loss = chosen[name][0]
        metrics = dict(held_out_metrics(setting.teacher, trained.model, setting.held_out, loss))
        if num_bytes := drawn.num_bytes(form, loss):
            metrics["bytes"] = statistics.mean(num_bytes)
        files[name, form].write_text(json.dumps(metrics))
    return {key: json.loads(file.read_text()) for key, file in files.items()}


def _warm_state(setting: Setting, seed: int) -> Mapping[str, Tensor]:
    """Weights of a student after `warm_steps` of cross-entropy on rows of its own; empty without any."""
    steps = setting.sizes["warm_steps"]
    if not steps:
        return {}
    name = "warm-{student_width}-{student_batch}-{warm_steps}".format(**setting.sizes)
    path = setting.results.with_name(f"{name}-{seed}.pt")
    if not path.exists():
        warm = replace(setting, sizes={**setting.sizes, "steps": steps})
        student = _Student.new(warm, seed, {})
        for batch in training_rows(warm, 10_000 + seed):
            student.step(batch, None, LossConfig())
        torch.save(dict(student.model.state_dict()), path)
    weights: Mapping[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def _file_name(loss: LossConfig) -> str:
    return f"{loss.terms[0].divergence}-{loss.temperature:g}"


@dataclass(kw_only=True, slots=True)
class _Student:
    """A student in training."""

    model: Any
    optimizer: Any
    schedule: Any
    workspace: Workspace

    @classmethod
    def new(cls, setting: Setting, seed: int, weights: Mapping[str, Tensor]) -> _Student:
        """A student before its first step, the same for all losses and forms of a seed; with random weights if there are none."""
        torch.manual_seed(seed)
        model = make_model(setting.sizes["student_width"], 2, setting.sizes["vocabulary"])
        if weights:
            model.load_state_dict(weights)
        optimizer, schedule = make_optimizer(model, setting.sizes["steps"])
        return cls(model=model, optimizer=optimizer, schedule=schedule, workspace=Workspace())

    def step(self, batch: Tensor, targets: DenseTargets | SparseTargets | None, loss: LossConfig) -> None:
        """Takes one step."""
        summed = summed_loss(self.model, batch, targets, loss, self.workspace)
        take_step(summed / batch[:, 1:].numel(), self.model, self.optimizer, self.schedule)


class _SharedTargets:
    """Targets of a batch, made once for all students that take the same: those of one temperature and form, with the draws'
    log-probabilities or without. Draws of every such kind begin with the same seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._draws: dict[tuple[Any, ...], torch.Generator] = {}
        self._num_bytes: dict[tuple[Any, ...], list[float]] = {}
        self._made: dict[tuple[Any, ...], DenseTargets | SparseTargets] = {}

    def of(self, logprobs: Tensor, form: Form, loss: LossConfig) -> DenseTargets | SparseTargets:
        """Targets of the batch with these log-probabilities of the teacher."""
        key = self._key(form, loss)
        if key not in self._made:
            draws = self._draws.setdefault(key, torch.Generator().manual_seed(self._seed))
            num_bytes = self._num_bytes.setdefault(key, [])
            self._made[key] = targets_of(logprobs, form, draws, loss, num_bytes)
        return self._made[key]

    def forget(self) -> None:
        """Ends a batch."""
        self._made.clear()

    def num_bytes(self, form: Form, loss: LossConfig) -> list[float]:
        """Bytes of a token's targets, of each step; empty for forms whose bytes are known beforehand."""
        return self._num_bytes.get(self._key(form, loss), [])

    def _key(self, form: Form, loss: LossConfig) -> tuple[Any, ...]:
        return form, loss.temperature, takes_draw_logprobs(loss)


def _compare_gradients(setting: Setting, console: Console) -> dict[str, Any]:
    """Cosines of the forms' gradients with the full one along a full student, and how often a truncated loss is clamped."""
    torch.manual_seed(0)
    loss, student = LossConfig(), make_model(setting.sizes["student_width"], 2, setting.sizes["vocabulary"])
    optimizer, schedule = make_optimizer(student, setting.sizes["steps"])
    draws = torch.Generator().manual_seed(1000)
    cosines: dict[str, list[float]] = {}
    positions_below, steps_below = [], []
    for step, (batch, logprobs) in enumerate(batches(setting, 0)):
        full = targets_of(logprobs, FULL, draws, loss)
        if step % GRADIENTS_EVERY == 0:
            log_q = student(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            truncated, below = truncated_kl(log_q.detach(), logprobs, 64, clamp=False)
            positions_below.append(float(below))
            steps_below.append(float(truncated < 0))
            losses: dict[str, Callable[[], Tensor]] = {
                str(form): partial(summed_loss, student, batch, targets_of(logprobs, form, draws, loss), loss)
                for form in (settled(each, loss, setting.sizes["vocabulary"]) for each in FORMS)
            }
            for clamp, name in ((False, "truncated k=64"), (True, "truncated k=64, clamped")):
                losses[name] = partial(_truncated, student, batch, logprobs, clamp=clamp)
            found = gradient_cosines(
                list(student.parameters()), partial(summed_loss, student, batch, full, loss), losses
            )
            for name, cosine in found.items():
                cosines.setdefault(name, []).append(cosine)
        summed = summed_loss(student, batch, full, loss)
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


def _shares(found: Mapping[Form, Sequence[float]], form: Form) -> tuple[float, float]:
    """Mean over seeds of (CE - form) / (CE - full), and half its 95 % interval (Student's t)."""
    every = zip(found[CROSS_ENTROPY], found[FULL], found[form], strict=True)
    shares = [(base - value) / (base - full) if base != full else math.nan for base, full, value in every]
    interval = paired_interval(shares, [0.0] * len(shares))
    return interval.mean, interval.high - interval.mean


if __name__ == "__main__":
    main()
