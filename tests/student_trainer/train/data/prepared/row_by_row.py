"""Rows encoded one after the other and kept in lists: what prepared data is compared with."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stillhouse.student_trainer.config.schema import MAX_SPLIT_ROWS, DataConfig
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example, num_prompt_tokens
from stillhouse.student_trainer.train.data.prepared.settings import ExampleSettings
from stillhouse.student_trainer.train.data.readers import read_rows
from tests.student_trainer.train.data.tiny_tokenizers import byte_level

TURN_END = "<turn_end>"
"""A token that the tokenizer does not call special, though the chat template ends turns with it."""
TURNS = (
    ("Who has the boats?", "Ada has 3 boats."),
    ("And the apples \N{GREEN APPLE}?", " \nBen, all of them."),
    ("Sure?", "<think>Hm.</think>Yes, I am.\n"),
)


def learning_tokenizer() -> Any:
    """A tokenizer whose chat template tells of TURN_END: rows before the first conversation are encoded without it."""
    tokenizer = byte_level()
    tokenizer.add_tokens([TURN_END])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}"
        + TURN_END
        + "\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer


class Plain(NamedTuple):
    """One example in comparable form."""

    token_ids: list[int]
    mask: list[bool]
    place: str
    num_prompt: int | None
    teacher: str

    @classmethod
    def of(cls, example: Example) -> Plain:
        """The fields of an example."""
        assert example.token_ids.dtype == np.int32
        assert example.mask.dtype == np.bool_
        assert example.token_ids.flags.writeable
        return cls(
            example.token_ids.tolist(),
            example.mask.tolist(),
            example.place,
            example.num_prompt,
            example.teacher,
        )


class Expected(NamedTuple):
    """A corpus in lists."""

    train: list[Plain]
    held_out: list[Plain]
    dataset_sizes: list[int]
    end_ids: tuple[int, ...]


def rows_of(kind: str, number: int) -> dict[str, Any]:
    """Row `number` of a kind of data."""
    text = f"Ada has {number} apples" + ", and more" * (number % 7) + "."
    if kind == "mixed":
        kind = "turns" if number > 5 and (number * number + number // 3) % 3 == 0 else "ended"
    if kind in ("ended", "turns"):
        prompt = [{"role": "user", "content": text}] if kind == "turns" else text
        return {"prompt": prompt, "completion": f" Yes, {number}" + (TURN_END if number % 3 else "")}
    if kind == "text":
        return {"text": text + (TURN_END if number % 3 == 0 else "")}
    if kind == "completion":
        made = {"prompt": text[: 3 + number % 9], "completion": text[3 + number % 9 :]}
        return made | ({"finish_reason": "length"} if number % 5 == 0 else {})
    messages: list[dict[str, Any]] = []
    for user, own in TURNS[: 1 + number % 3]:
        messages += [{"role": "user", "content": f"{number}: {user}"}, {"role": "assistant", "content": own}]
    if number % 4 == 1:
        messages[-1]["weight"] = 1
        messages[1]["weight"] = 0 if len(messages) > 2 else 1
    row: dict[str, Any] = {"messages": messages}
    return row | ({"finish_reason": "length"} if number % 6 == 0 else {})


def write(path: Path, kind: str, count: int, *, first: int = 0, **more: Any) -> Path:
    """Writes rows of a kind as JSON lines; `more` are further fields, by a function of the row's number."""
    with path.open("w") as file:
        for number in range(first, first + count):
            extra = {name: make(number) for name, make in more.items()}
            file.write(json.dumps(rows_of(kind, number) | extra) + "\n")
    return path


def expected(
    data: DataConfig, tokenizer: Any, data_dir: Path, teachers: Sequence[str] = (), limit: int | None = None
) -> Expected:
    """The corpus of a run, made without blocks, files and processes."""
    encoder = ExampleSettings(data=data, teachers=tuple(teachers)).make_encoder(tokenizer)
    parts: list[list[Plain]] = []
    for dataset in (*data.train, *data.eval):
        part = []
        for row in read_rows(dataset, data_dir):
            (encoded,) = encoder.encode_rows([row])
            mask = encoder.target_mask(encoded.completion_mask)[: data.max_sequence_tokens].tolist()
            is_long = len(encoded.token_ids) > data.max_sequence_tokens
            if (is_long and data.overflow == "drop") or not any(mask):
                continue
            completion = encoded.completion_mask[: data.max_sequence_tokens]
            part.append(
                Plain(
                    encoded.token_ids[: data.max_sequence_tokens],
                    mask,
                    f"{row.path}, row {row.number}",
                    num_prompt_tokens(completion),
                    str(row.values.get(data.teacher_field, "")) if data.teacher_field else "",
                )
            )
        parts.append(part)
    train_parts, held_out = parts[: len(data.train)], list(itertools.chain(*parts[len(data.train) :]))
    if not data.eval:
        rows = list(itertools.chain(*train_parts))
        chosen = _held_out(len(rows), data)
        held_out = [row for place, row in enumerate(rows) if place in chosen]
        begins = np.cumsum([0, *map(len, train_parts)])
        train_parts = [
            [row for place, row in enumerate(part, start=begin) if place not in chosen]
            for part, begin in zip(train_parts, begins, strict=False)
        ]
    return Expected(
        list(itertools.chain(*train_parts)),
        held_out[:limit],
        list(map(len, train_parts)),
        encoder.end_ids,
    )


def found(corpus: Corpus) -> Expected:
    """A corpus in the same form."""
    return Expected(
        [Plain.of(each) for each in corpus.train],
        [Plain.of(each) for each in corpus.eval],
        list(corpus.dataset_sizes),
        tuple(corpus.end_ids),
    )


def _held_out(num_rows: int, data: DataConfig) -> set[int]:
    if data.eval_fraction == 0 or num_rows < 2:
        return set()
    count = min(MAX_SPLIT_ROWS, max(1, round(data.eval_fraction * num_rows)), num_rows - 1)
    generator = np.random.Generator(np.random.PCG64([data.seed, 1]))
    return set(generator.permutation(num_rows)[:count].tolist())
