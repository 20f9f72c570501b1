"""Acceptance experiment: every training objective, through teacher, run service and training processes, on languages
of known truth.

Four parts. Dense: an order-2 language with a teacher that knows it fairly. Sparse: a language of few successors with
a teacher of high entropy, where truncated targets differ. On-policy: students that start as the first part's
cross-entropy students train on their own samples. Curves: one run in several ways, online, cached, killed, must have
the same losses. Seeds change data, weights and order; arms of a seed share them. Metrics are computed here, exactly,
on a run's final model. Results are stored run by run: name the work folder to resume.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.acceptance import arms
from benchmarks.acceptance.arms import ARMS, Arm, ArmMetrics, Group
from benchmarks.acceptance.curves import CURVES, curve_here, differences
from benchmarks.acceptance.languages import (
    BATCH,
    NUM_LOGITS,
    Language,
    kl_from_truth,
    load,
    on_policy_kl,
    write_rows,
    write_student,
    write_teacher,
)
from examples.demo.__main__ import signals_as_exceptions
from stillhouse.client.api import RunHandle, StillhouseError, Trainer
from stillhouse.client.trainer.run_handle import ENDED
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.support.programs import ProgramError, start_program, start_teacher, start_trainer

LENGTH, TRAIN_ROWS, HELD_OUT_ROWS, STEPS = 48, 128, 256, 80
HELD_OUT_SEED, TRAIN_SEED = 7, 100
WRITTEN_LENGTH, WRITTEN_ROWS, UPDATES = 24, 512, 50
"""Length, rows and updates of the on-policy part."""
LEARNING_RATE = 3e-3
LANGUAGES: dict[str, tuple[Callable[[], Language], int]] = {
    "dense": (Language.dense, 250),
    "sparse": (Language.sparse, 150),
}
"""Languages, each with its teacher's training steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """The running services, and their directories."""

    client: Trainer
    targets: dict[tuple[str, bool], str]
    """Teacher addresses by language, and by whether rows are shuffled."""
    teachers: dict[str, Path]
    work_dir: Path
    data_dir: Path
    """Data directory of the run service."""

    def complete(self, group: Group, seeds: int) -> dict[str, list[float]]:
        """Completes missing runs; returns the metric of each, by arm and seed.

        Submitted seed by seed, so that every slot is busy and an interruption leaves complete pairs.
        """
        wanted = [(group, arm, seed) for seed in range(seeds) for arm in ARMS[group]]
        missing = [each for each in wanted if not self._file(*each).exists()]
        handles = [None if each[1].program else self.client.create_run(self._spec(*each)) for each in missing]
        for each, handle in zip(missing, handles, strict=True):
            _, arm, seed = each
            directory = self._model(*each)
            shutil.rmtree(directory, ignore_errors=True)
            if handle is None:
                self._train(arm.program, self._spec(*each), directory)
            else:
                self._pull(handle, directory)
            value = self._measured(group, directory, seed)
            self._file(*each).write_text(json.dumps(value))
            click.echo(f"{group}, {arm.name}, seed {seed}: {value:.4f}", err=True)
        return {
            arm.name: [json.loads(self._file(group, arm, seed).read_text()) for seed in range(seeds)]
            for arm in ARMS[group]
        }

    def curves(self, seed: int) -> dict[str, float]:
        """Largest loss difference of the run with the full vocabulary to the online run, by variant."""
        file = self.work_dir / "results" / f"curves-{seed}.json"
        if not file.exists():
            spec = self._spec("dense", arms.FULL, seed)
            del spec["cache"]
            here = curve_here(
                self.teachers["dense"],
                self._student("dense", seed),
                LANGUAGES["dense"][0]().sample(TRAIN_ROWS, LENGTH, TRAIN_SEED + seed),
                steps=STEPS,
                rate=LEARNING_RATE,
                batch=BATCH,
                seed=seed,
            )
            found = differences(
                self.client, spec, cache=f"caches/curves-{seed}", data_dir=self.data_dir, here=here
            )
            file.write_text(json.dumps(found))
            click.echo(f"curves, seed {seed}: {found}", err=True)
        return dict(json.loads(file.read_text()))

    def _spec(self, group: Group, arm: Arm, seed: int) -> dict[str, Any]:
        """Run file of an arm; writes its dataset if missing."""
        language = "dense" if group == "on-policy" else group
        rows, others = (self.work_dir / f"{name}-{language}-{seed}.jsonl" for name in ("rows", "others"))
        if not others.exists():
            made = LANGUAGES[language][0]()
            write_rows(made.sample(TRAIN_ROWS, LENGTH, TRAIN_SEED + seed), rows)
            write_rows(made.sample(4, LENGTH, HELD_OUT_SEED), others)
        spec: dict[str, Any] = {
            "display_name": f"{group}, {arm.name}, seed {seed}",
            "student": {"model": str(self._student(group, seed))},
            "teachers": [{"targets": [self.targets[language, arm.shuffled]], "logprob_dtype": "float32"}],
            "data": {
                "train": [{"path": str(rows)}],
                "eval": [{"path": str(others)}],
                "max_sequence_tokens": WRITTEN_LENGTH if group == "on-policy" else LENGTH,
            },
            "contexts": [_on_policy() if group == "on-policy" else {"dataset": {}}],
            "loss": dict(arm.loss),
            "optimizer": {
                "learning_rate": LEARNING_RATE,
                "max_steps": UPDATES if group == "on-policy" else STEPS,
                "micro_batch_size": BATCH,
                "seed": seed,
            },
            "evaluation": {"top_k": NUM_LOGITS},
        }
        if group != "on-policy" and arm is not arms.CROSS_ENTROPY and not arm.shuffled:
            # Rows repeat in every epoch: the teacher scores them once, over the wire, into a cache.
            spec["cache"] = {"path": f"caches/{_plain(group, arm)}-{seed}", "mode": "write_through"}
        return spec

    def _student(self, group: Group, seed: int) -> Path:
        """Initial checkpoint of a seed's student."""
        if group == "on-policy":
            return self._model("dense", arms.CROSS_ENTROPY, seed)
        return write_student(self.work_dir / f"student-{seed}", seed=seed, length=LENGTH)

    def _pull(self, handle: RunHandle, directory: Path) -> None:
        """Downloads a run's model through the service."""
        run = handle.wait()
        if run.state != Run.STATE_COMPLETED:
            raise click.ClickException(f"{run.name} ({run.spec.display_name}) failed: {run.error.message}")
        handle.pull("final", directory)

    def _train(self, program: str, spec: dict[str, Any], directory: Path) -> None:
        """Trains in a process of this program, started as the run service starts its own; returns the model's directory."""
        run_dir = self.work_dir / "by-hand" / "runs" / directory.name
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        file, log = run_dir.with_suffix(".spec.json"), run_dir.with_suffix(".log")
        file.write_text(json.dumps(spec))
        arguments = [sys.executable, "-m", program, str(run_dir), "--attempt", "1", "--spec", str(file)]
        with log.open("wb") as output:
            code = subprocess.run(
                arguments,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            ).returncode
        if code:
            raise click.ClickException(f"{program} ended with {code}; its log is {log}")
        shutil.copytree(run_dir / "final", directory)

    def _measured(self, group: Group, directory: Path, seed: int) -> float:
        student = load(directory)
        if group != "on-policy":
            language = LANGUAGES[group][0]()
            return kl_from_truth(language, student, language.sample(HELD_OUT_ROWS, LENGTH, HELD_OUT_SEED))
        teacher, before = load(self.teachers["dense"]), load(self._student(group, seed))
        after_kl, before_kl = (
            on_policy_kl(model, teacher, count=WRITTEN_ROWS, length=WRITTEN_LENGTH, seed=seed)[0]
            for model in (student, before)
        )
        return after_kl / before_kl

    def _file(self, group: Group, arm: Arm, seed: int) -> Path:
        return self.work_dir / "results" / f"{_plain(group, arm)}-{seed}.json"

    def _model(self, group: Group, arm: Arm, seed: int) -> Path:
        return self.work_dir / "models" / f"{_plain(group, arm)}-{seed}"


def _plain(group: Group, arm: Arm) -> str:
    return "".join(each if each.isalnum() else "-" for each in f"{group} {arm.name}")


def _on_policy() -> dict[str, Any]:
    """Completions after the first token of a row."""
    generation = {"max_new_tokens": WRITTEN_LENGTH - 1, "samples_per_prompt": 2}
    # Students of few steps sample little that the teacher finds likely: the gate for that is wide here.
    return {"student": {"generation": generation, "max_staleness": 0, "min_teacher_logprob": -8}}


def report(found: ArmMetrics) -> Iterator[str]:
    """Renders the report as Markdown."""
    for group in ("dense", "sparse"):
        yield f"| {group} | held-out KL(truth, student) | gain over cross-entropy | share of the full gain |"
        yield "|---|---|---|---|"
        full = arms.gain(found, group, arms.FULL).mean
        for arm in ARMS[group]:
            values, gain = found.values[group][arm.name], arms.gain(found, group, arm)
            cells = ["", ""] if arm is arms.CROSS_ENTROPY else [str(gain), f"{gain.mean / full:.0%}"]
            yield f"| {arm.name} | {sum(values) / len(values):.4f} | {' | '.join(cells)} |"
        yield ""
    yield "| on-policy | reverse KL that is gone |"
    yield "|---|---|"
    for arm in ARMS["on-policy"]:
        yield f"| {arm.name} | {arms.drop(found, arm)} |"
    yield ""
    yield "| curves, against the run online | largest difference of a step's loss |"
    yield "|---|---|"
    yield from (f"| {way} | {max(values):.1e} |" for way, values in found.curves.items())
    yield ""
    yield from (f"- {claim}" for claim in arms.claims(found))


@click.command()
@click.option("--seeds", default=5, show_default=True)
@click.option(
    "--on-policy-seeds", default=5, show_default=True, help="Seeds of the on-policy part, at most --seeds."
)
@click.option("--curve-seeds", default=1, show_default=True, help="Seeds of the curves, at most --seeds.")
@click.option("--engine", type=click.Choice(["vllm", "hf"]), default="hf", show_default=True)
@click.option("--slots", default=1, show_default=True, help="Concurrent runs.")
@click.option(
    "--work-dir", type=click.Path(path_type=Path), required=True, help="Work folder; name it again to resume."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for everything as JSON.")
def main(
    *,
    seeds: int,
    on_policy_seeds: int,
    curve_seeds: int,
    engine: str,
    slots: int,
    work_dir: Path,
    json_file: Path | None,
) -> None:
    """Run missing runs, and report."""
    work_dir = work_dir.resolve()
    (work_dir / "results").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    teachers = {
        name: write_teacher(make(), work_dir / f"teacher-{name}", steps=steps, length=LENGTH)
        for name, (make, steps) in LANGUAGES.items()
    }
    try:
        with signals_as_exceptions(), ExitStack() as stack:
            bench = _bench(stack, teachers, work_dir, engine, slots)
            values: dict[Group, dict[str, list[float]]] = {"dense": bench.complete("dense", seeds)}
            # These start from students of the first part.
            values["on-policy"] = bench.complete("on-policy", min(seeds, on_policy_seeds))
            curves = [bench.curves(seed) for seed in range(min(seeds, curve_seeds))]
            values["sparse"] = bench.complete("sparse", seeds)
    except (ProgramError, StillhouseError) as error:
        raise click.ClickException(str(error)) from error
    found = ArmMetrics(values=values, curves={way: [each[way] for each in curves] for way in CURVES})
    click.echo("\n".join(report(found)))
    claims = arms.claims(found)
    if json_file is not None:
        told = [{**asdict(claim), "holds": claim.holds} for claim in claims]
        content = {"engine": engine, "values": found.values, "curves": found.curves}
        json_file.write_text(json.dumps({**content, "claims": told}, indent=2) + "\n")
    sys.exit(0 if all(claim.holds for claim in claims) else 1)


def _bench(
    stack: ExitStack, teachers: dict[str, Path], work_dir: Path, engine: str, slots: int
) -> Experiment:
    logs = work_dir / "logs"
    targets = {}
    for name, directory in teachers.items():
        options = ["--dtype", "float32", "--threads", "1"]
        served = stack.enter_context(
            start_teacher(directory, engine=engine, directory=logs, options=options, name=f"teacher-{name}")
        )
        targets[name, False] = served.target
    arguments = [
        "benchmarks.distillation.shuffling_proxy",
        "--target",
        targets["dense", False],
        "--top-k",
        str(arms.SHUFFLED_TOP_K),
    ]
    proxy = stack.enter_context(start_program("shuffling-proxy", arguments, directory=logs))
    targets["dense", True] = proxy.target
    data_dir = work_dir / "trainer"
    service = stack.enter_context(
        start_trainer(
            data_dir,
            directory=logs,
            options=["--cpu-slots", str(slots), "--stop-runs-on-exit", "--stop-grace-s", "5"],
        )
    )
    client = stack.enter_context(Trainer(service.target))
    for run in list(client.runs()):
        if run.state not in ENDED:
            # Runs left by an interrupted experiment would query teachers that are gone, and come first.
            RunHandle(client, run.name).stop()
    return Experiment(client=client, targets=targets, teachers=teachers, work_dir=work_dir, data_dir=data_dir)


if __name__ == "__main__":
    main()
