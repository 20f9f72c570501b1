"""Texts of known classes: a language for each class, whose words follow each other in another way; some texts fit several."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.support.small_models import make_encoder, make_wordpiece

CLASSES = ("amber", "cobalt", "jade", "scarlet")
NUM_WORDS, LENGTHS = 24, (8, 17)
OWN_SHARE = 0.55
"""Share of the steps from word to word that are the class's own; the others are the same in every class."""
BATCH, LEARNING_RATE = 64, 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Languages:
    """Transitions [C, W, W] of the classes' words."""

    steps: np.ndarray

    @classmethod
    def make(cls, seed: int = 0) -> Languages:
        """Makes the languages of a seed."""
        rng = np.random.default_rng(seed)
        shared = rng.dirichlet(np.full(NUM_WORDS, 0.3), size=NUM_WORDS)
        own = rng.dirichlet(np.full(NUM_WORDS, 0.3), size=(len(CLASSES), NUM_WORDS))
        return cls(steps=(1 - OWN_SHARE) * shared + OWN_SHARE * own)

    def sample(self, number: int, seed: int) -> list[dict[str, Any]]:
        """Rows with `text` and `label`."""
        rng = np.random.default_rng(seed)
        sums = self.steps.cumsum(-1)
        rows = []
        for _ in range(number):
            label, length = int(rng.integers(len(CLASSES))), int(rng.integers(*LENGTHS))
            words = [int(rng.integers(NUM_WORDS))]
            for draw in rng.random(length - 1):
                words.append(min(int(np.searchsorted(sums[label, words[-1]], draw)), NUM_WORDS - 1))
            rows.append({"text": " ".join(_word(each) for each in words), "label": CLASSES[label]})
        return rows

    def best_accuracy(self, rows: list[dict[str, Any]]) -> float:
        """Accuracy of who knows the languages."""
        logs = np.log(self.steps)
        right = 0
        for row in rows:
            words = [WORDS.index(each) for each in row["text"].split()]
            scores = logs[:, words[:-1], words[1:]].sum(1)
            right += CLASSES[int(scores.argmax())] == row["label"]
        return right / len(rows)


def _word(number: int) -> str:
    return "bdfgklmnprstvz"[number // 5] + "aeiou"[number % 5]


WORDS = [_word(number) for number in range(NUM_WORDS)]


def write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
    """JSONL of rows."""
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def write_teacher(languages: Languages, directory: Path, *, num_rows: int, steps: int) -> Path:
    """A teacher trained on the labels of `num_rows` rows, unless an earlier call wrote it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if (directory / "trained").exists():
        return directory
    words = make_wordpiece([" ".join(WORDS)], directory / "tokenizer", 200, max_tokens=32)
    make_encoder(
        directory, tokenizer_dir=words, class_names=CLASSES, hidden_size=128, num_layers=2, num_heads=4
    )
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = languages.sample(num_rows, seed=11)
    encoded = tokenizer([each["text"] for each in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([CLASSES.index(each["label"]) for each in rows])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        picks = torch.randint(len(rows), (BATCH,), generator=generator)
        logits = model(
            input_ids=encoded["input_ids"][picks], attention_mask=encoded["attention_mask"][picks]
        ).logits
        loss = nn.functional.cross_entropy(logits, labels[picks])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    model.save_pretrained(directory)
    (directory / "trained").touch()
    return directory


def write_student(teacher: Path, directory: Path, seed: int) -> Path:
    """A student of random weights with a quarter of the teacher's."""
    if directory.exists():
        return directory
    return make_encoder(
        directory,
        tokenizer_dir=teacher,
        class_names=CLASSES,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        seed=seed,
    )
