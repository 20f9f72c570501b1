"""Small models with adapters for categories, the services that serve and train them, and the command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stillhouse.client.api import RunHandle, Trainer
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.support.programs import Program, start_program, start_teacher, start_trainer

CATEGORIES = (
    "banks",
    "households",
    "insurance_companies",
    "investment_advisors",
    "mutual_funds",
    "other",
    "pension_funds",
)
COMMAND_TIMEOUT_S = 300.0
POOL_ROWS = 20
"""Rows of each pool of a category."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of its output as JSON."""
        return json.loads(self.out.strip().splitlines()[-1])


@dataclass
class World:
    """Models, services and files; each is made when it is first used."""

    work: Path
    engine: str
    stack: ExitStack
    notes: dict[str, Any] = field(default_factory=dict)
    """Things that one row leaves for another."""

    def stillhouse(self, *arguments: str | Path, expect: int | None = 0, **environment: str) -> Done:
        """The client's command line, with both services; its exit code must be `expect`, unless that is None."""
        services = ("--trainer", self.trainer.target, "--teacher", self.teacher.target)
        return self.command(
            [sys.executable, "-m", "stillhouse.client", *services, *arguments], expect=expect, **environment
        )

    def local(self, *arguments: str | Path, expect: int | None = 0) -> Done:
        """The client's command line without a service."""
        return self.command([sys.executable, "-m", "stillhouse.client", *arguments], expect=expect)

    def local_with(self, package: Path, *arguments: str | Path) -> Done:
        """The client's command line with the packages below `package` installed."""
        words = [sys.executable, "-m", "stillhouse.client", *arguments]
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        return self.command(words, PYTHONPATH=os.pathsep.join(paths))

    def command(self, words: Sequence[str | Path], *, expect: int | None = 0, **environment: str) -> Done:
        """Any command."""
        done = subprocess.run(
            [str(each) for each in words],
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            env={**os.environ, "COLUMNS": "160", **environment},
            cwd=self.work,
            check=False,
        )
        if expect is not None and done.returncode != expect:
            raise AssertionError(
                f"{' '.join(map(str, words))}\nended with {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
            )
        return Done(code=done.returncode, out=done.stdout, err=done.stderr)

    @cached_property
    def documents(self) -> list[dict[str, str]]:
        """Rows with prompts and tagged answers, of all categories."""
        return [row for category in CATEGORIES for row in holdings(category, 200, seed=1)]

    @cached_property
    def base(self) -> Path:
        """A teacher that writes tagged answers."""
        from tests.support.train_teacher import TeacherRecipe, train_teacher

        directory = self.work / "teacher"
        if not (directory / "held_out.jsonl").exists():
            texts = [conversation(row) for row in self.documents]
            recipe = TeacherRecipe(
                vocab_size=400,
                hidden_size=64,
                num_layers=2,
                num_heads=2,
                steps=200,
                sequence_tokens=128,
                max_sequence_tokens=256,
                held_out_fraction=0.01,
            )
            train_teacher(texts, directory, recipe, report=lambda _line: None)
        return directory

    @cached_property
    def adapters(self) -> dict[str, Path]:
        """A trained LoRA adapter of the teacher for each category."""
        from tests.support.train_adapter import train_adapter

        found = {}
        for category in CATEGORIES:
            texts = [conversation(row) for row in holdings(category, 64, seed=2)]
            found[category] = train_adapter(
                self.work / "adapters" / category, self.base, texts, steps=4, rank=4
            )
        return found

    @cached_property
    def student(self) -> Path:
        """A student of random weights, a quarter of the teacher."""
        from tests.support.small_models import make_student

        return make_student(
            self.base, self.work / "student", hidden_size=32, num_layers=1, num_heads=1, seed=0
        )

    @cached_property
    def teacher(self) -> Program:
        """The teacher with all adapters."""
        options = ["--dtype", "float32", "--max-adapters", str(len(CATEGORIES))]
        for category, path in self.adapters.items():
            options += ["--adapter", f"{category}={path}"]
        return self.stack.enter_context(
            start_teacher(self.base, engine=self.engine, directory=self.work / "logs", options=options)
        )

    @cached_property
    def trainer(self) -> Program:
        """The run service."""
        options = ["--cpu-slots", "2", "--stop-runs-on-exit", "--stop-grace-s", "5"]
        return self.stack.enter_context(
            start_trainer(self.data_dir, directory=self.work / "logs", options=options)
        )

    @cached_property
    def web(self) -> Program:
        """The web server, at `.target`."""
        arguments = ["stillhouse.client", "web", "--trainer", self.trainer.target, "--listen", "127.0.0.1:0"]
        return self.stack.enter_context(
            start_program(
                "web",
                arguments,
                directory=self.work / "logs",
                environment={"XDG_CONFIG_HOME": str(self.work)},
            )
        )

    @property
    def data_dir(self) -> Path:
        """The run service's data."""
        return self.work / "trainer"

    @cached_property
    def client(self) -> Trainer:
        """The run service from Python."""
        return self.stack.enter_context(Trainer(self.trainer.target))

    @contextmanager
    def another_teacher(self, model: Path, name: str, *options: str) -> Iterator[Program]:
        """A further teacher on transformers, for one row."""
        with start_teacher(
            model,
            engine="hf",
            directory=self.work / "logs",
            options=["--dtype", "float32", *options],
            name=name,
        ) as program:
            yield program

    def program(self, *words: str) -> Done:
        """A program of Stillhouse by its module, to its end."""
        return self.command([sys.executable, "-m", *words])

    @cached_property
    def pools(self) -> Path:
        """Pools of rows in both layouts of the recipe."""
        root = self.work / "recipe"
        for category in CATEGORIES:
            for kind, name, seed in (("grpo", f"grpo_{category}", 3), ("sft", f"sft_train_{category}", 4)):
                write_rows(root / "artifacts" / kind / f"{name}.jsonl", holdings(category, POOL_ROWS, seed))
        return root

    @cached_property
    def rows(self) -> Path:
        """Training rows of all categories."""
        return write_rows(
            self.work / "rows.jsonl",
            [row for category in CATEGORIES for row in holdings(category, 12, seed=5)],
        )

    def run_spec(self, **changes: Mapping[str, Any] | Any) -> dict[str, Any]:
        """A run of a few steps; a section in `changes` is merged over it."""
        spec: dict[str, Any] = {
            "student": {"model": str(self.student)},
            "teachers": [{"targets": [self.teacher.target]}],
            "data": {"train": [{"path": str(self.rows)}], "max_sequence_tokens": 128},
            "optimizer": {"learning_rate": 2e-3, "max_steps": 2, "batch_size": 8},
            "evaluation": {"limit": 8},
        }
        for name, value in changes.items():
            merged = isinstance(value, Mapping) and isinstance(spec.get(name), Mapping)
            spec[name] = {**spec[name], **value} if merged else value
        return {name: value for name, value in spec.items() if value is not None}

    def complete(self, **changes: Mapping[str, Any] | Any) -> RunHandle:
        """A run to its end, which must be COMPLETED."""
        handle = self.client.create_run(self.run_spec(**changes))
        run = handle.wait()
        if run.state != Run.STATE_COMPLETED:
            raise AssertionError(f"run {handle.id}: {run.error.message or Run.State.Name(run.state)}")
        return handle


def holdings(category: str, count: int, seed: int) -> list[dict[str, str]]:
    """Rows of one category: a prompt, and an answer in tags as the recipe's models write it."""
    # The category is part of the seed, as text, so that no two have the same rows.
    generator = random.Random(f"{category} {seed}")
    rows = []
    for number in range(count):
        before, after = generator.randint(1, 9), generator.randint(1, 9)
        delta = {"holding_log_delta": round((after - before) / 10, 1)}
        rows.append(
            {
                "id": f"{category}-{seed}-{number}",
                "system": "You manage a fund.",
                "prompt": f"{category} held {before}, will hold {after}. ",
                "completion": f"<think>{after} - {before}</think><answer>{json.dumps(delta)}</answer>",
                "category": category,
            }
        )
    return rows


def conversation(row: Mapping[str, str]) -> str:
    """The row as the small models' chat template renders it."""
    turns = (("system", row["system"]), ("user", row["prompt"]), ("assistant", row["completion"]))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """`rows` as JSONL at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def encoder_program(world: World, model: Path) -> Program:
    """A teacher that serves an encoder with classes."""
    return start_program(
        "classifier",
        ["stillhouse.teacher_service", "--model", str(model), "--engine", "hf", "--listen", "127.0.0.1:0"],
        directory=world.work / "logs",
    )
