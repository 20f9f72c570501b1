"""Small classifiers, rows for them, and a served teacher."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import Program, start_teacher
from tests.support.small_models import make_encoder, make_wordpiece

NAMES = ("praise", "blame", "question")
WORDS = {
    "praise": ("fine", "lovely", "warm", "kind"),
    "blame": ("cold", "late", "broken", "rude"),
    "question": ("when", "where", "why", "who"),
}
FILLERS = ("the", "tea", "train", "house", "came", "was", "today", "again")


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoders:
    """Directories of classifiers over NAMES, of an encoder without a head, and of rows."""

    teacher: Path
    student: Path
    """A narrower classifier whose classes stand in another order."""
    headless: Path
    rows: Path
    """64 rows with `text` and, in every third, `text_pair`, and `label`."""


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    root = tmp_path_factory.mktemp("encoders")
    rows = made_rows(64)
    words = make_wordpiece([each["text"] for each in rows], root / "tokenizer", 200)
    path = root / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    teacher = make_encoder(
        root / "teacher", tokenizer_dir=words, class_names=NAMES, seed=1, initializer_range=0.4
    )
    student = make_encoder(
        root / "student",
        tokenizer_dir=words,
        class_names=NAMES[::-1],
        hidden_size=16,
        num_layers=1,
        seed=2,
        initializer_range=0.2,
    )
    headless = make_encoder(root / "headless", tokenizer_dir=words, seed=3, initializer_range=0.2)
    return Encoders(teacher=teacher, student=student, headless=headless, rows=path)


def made_rows(number: int) -> list[dict[str, Any]]:
    """Rows whose label follows from one word of their text."""
    rng = random.Random(0)
    found = []
    for index in range(number):
        label = rng.choice(NAMES)
        words = [*rng.choices(FILLERS, k=rng.randrange(3, 9)), rng.choice(WORDS[label])]
        rng.shuffle(words)
        pair = {"text_pair": " ".join(rng.choices(FILLERS, k=3))} if index % 3 == 0 else {}
        found.append({"text": " ".join(words), **pair, "label": label})
    return found


@pytest.fixture(scope="session")
def class_teacher(encoders: Encoders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    program = start_teacher(
        encoders.teacher,
        engine="hf",
        directory=tmp_path_factory.mktemp("class-teacher"),
        options=["--threads", "1"],
    )
    with program:
        yield program


def class_spec(
    student: Path, rows: Path, target: str | None, /, **further: Mapping[str, Any] | list[Any] | None
) -> dict[str, Any]:
    """A small run of a classifier: steps of 16 rows. `further` replaces fields inside sections."""
    spec: dict[str, Any] = {
        "task": "sequence_classification",
        "student": {"model": str(student)},
        "data": {"train": [{"path": str(rows)}], "eval_fraction": 0.25, "max_sequence_tokens": 64},
        "optimizer": {"learning_rate": 3e-3, "batch_size": 16, "epochs": 2.0},
    }
    if target is not None:
        spec["teachers"] = [{"targets": [target]}]
    for section, values in further.items():
        spec[section] = {**spec.get(section, {}), **values} if isinstance(values, Mapping) else values
    return spec
