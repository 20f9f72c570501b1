"""Training data from elsewhere: every file is read or refused by file and row, and nothing else happens."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import DataConfig, DatasetConfig, EvaluationConfig
from stillhouse.student_trainer.train.data.corpus import load_corpus
from tests.conftest import Models
from tests.fuzz.conftest import SEED, scaled, show
from tests.fuzz.values import some_string

KEYS = (
    "text",
    "prompt",
    "completion",
    "messages",
    "role",
    "content",
    "tools",
    "tool_calls",
    "weight",
    "system",
)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
ROWS: tuple[dict[str, Any], ...] = (
    {"text": "a house"},
    {"prompt": "a", "completion": "house"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "house"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1", "tool_call_id": "1"},
            {"role": "assistant", "content": "house", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
)


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    """A value that a field of a row may have by mistake."""
    plain = (None, True, 0, -1, 1.5, 10**400, float("nan"), "", "\ud800", "x" * 5000, some_string(rng, ()))
    if depth < 3 and rng.random() < 0.3:
        inner = [odd_value(rng, depth + 1) for _ in range(rng.randrange(3))]
        return inner if rng.random() < 0.5 else {rng.choice(KEYS): each for each in inner}
    return rng.choice(plain)


def spoilt(row: dict[str, Any], rng: random.Random) -> Any:
    """A row with one to three values replaced, added or removed, at any depth."""
    made = json.loads(json.dumps(row))
    for _ in range(rng.randrange(1, 4)):
        here: Any = made
        while isinstance(here, (dict, list)) and here and rng.random() < 0.6:
            key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
            if not isinstance(here[key], (dict, list)):
                break
            here = here[key]
        if isinstance(here, list):
            here.insert(rng.randrange(len(here) + 1), odd_value(rng))
        elif rng.random() < 0.2 and here:
            del here[rng.choice(list(here))]
        else:
            here[rng.choice((*here, *KEYS))] = odd_value(rng)
    return made if rng.random() < 0.95 else odd_value(rng)


def lines(rng: random.Random) -> bytes:
    """A JSONL file, mostly of good rows."""
    rows = [
        rng.choice(ROWS) if rng.random() < 0.6 else spoilt(rng.choice(ROWS), rng)
        for _ in range(rng.randrange(1, 4))
    ]
    text = "\n".join(json.dumps(row) for row in rows).encode()
    match rng.randrange(8):
        case 0:
            return text[: rng.randrange(len(text))]
        case 1:
            at = rng.randrange(len(text))
            return text[:at] + rng.randbytes(3) + text[at:]
        case 2:
            return b"\xef\xbb\xbf" + text
        case 3:
            return b'{"text":' * 20_000 + text
        case _:
            return text


def table(path: Path, rng: random.Random) -> None:
    """A Parquet file with columns of any type, possibly damaged."""
    column = rng.choice(
        (
            pa.array(["a house", "a garden", "by a river"]),
            pa.array(["a house", None, "by a river"]),
            pa.array([1, 2, None]),
            pa.array([[{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]] * 3),
            pa.array([b"a", b"\xff", None]),
            pa.array([None, None, None]),
            pa.array([{"a": 1.5}, None, {"a": None}]),
        )
    )
    pq.write_table(
        pa.table({rng.choice(("text", "messages", rng.choice(KEYS))): column, "id": pa.array([1, 2, 3])}),
        path,
    )
    if rng.random() < 0.5:
        data = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data[: len(data) if rng.random() < 0.7 else rng.randrange(len(data))]))


def saved(path: Path, rng: random.Random) -> None:
    """A directory of Hugging Face datasets, with one of its files damaged."""
    import datasets

    datasets.Dataset.from_list([{"text": "a house"}, {"text": "by a river"}]).save_to_disk(str(path))
    file = rng.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data[: rng.randrange(len(data))]) if rng.random() < 0.4 else bytes(data))


@pytest.mark.model
def test_training_data_is_read_or_refused_by_its_place(models: Models, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.student)
    outcomes: Counter[tuple[str, str]] = Counter()
    for number in range(scaled(150, 6000)):
        rng = random.Random(f"{SEED}/data/{number}")
        kind = rng.choice(("jsonl", "jsonl", "jsonl", "parquet", "saved")) if number % 5 else "parquet"
        path = tmp_path / f"rows{number}.{kind}"
        if kind == "jsonl":
            path.write_bytes(lines(rng))
        elif kind == "parquet":
            table(path, rng)
        else:
            saved(path, rng)
        config = DataConfig(
            train=(DatasetConfig(path=str(path)),),
            eval_fraction=0.0,
            max_sequence_tokens=64,
            overflow=rng.choice(("truncate", "drop")),
            extra_fields=rng.choice(("refuse", "keep")),
        )
        reason, message = "read", ""
        try:
            corpus = load_corpus(config, EvaluationConfig(), tokenizer, tmp_path)
            assert all(each.num_targets for each in corpus.train), number
        except StillhouseError as error:
            reason, message = str(error.reason), error.message
        assert not message or str(path) in message or "data.train" in message, (number, message)
        assert "\n" not in message, (number, message)
        outcomes[kind, reason] += 1
    show(
        "training data",
        (f"{kind:8} {reason:20} {count}" for (kind, reason), count in sorted(outcomes.items())),
    )
    assert {reason for _, reason in outcomes} == {"read", Reason.DATASET_INVALID}
