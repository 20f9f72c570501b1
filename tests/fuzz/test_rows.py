"""Rows from elsewhere: each is read or refused by name, by the client, the teacher and the training process alike."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stillhouse.client.batch.input_rows import InputLine, PromptRow, Sampling, plain_row
from stillhouse.client.batch.openai_input import openai_row
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.wire import from_wire, to_wire
from stillhouse.student_trainer.train.data.encoding import RowEncoder
from stillhouse.student_trainer.train.data.readers import DatasetRow
from stillhouse.teacher_service.models.tokenizer import TextCodec
from tests.fuzz.conftest import SEED, scaled, show
from tests.fuzz.values import FLOATS, INTS, STRINGS
from tests.protos.rows.chat_templates import PLAIN, TOOLS
from tests.support.small_models import make_tokenizer
from tests.support.texts import sentences

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
GOOD: tuple[dict[str, Any], ...] = (
    {"prompt": "a", "completion": "b", "system": "s", "tools": [TOOL]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"text": "t", "id": 1, "weight": 1},
    {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "s"}]},
            {"role": "user", "content": "a", "name": "Ada"},
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL], "weight": 0},
            {"role": "tool", "content": "x", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "b", "reasoning_content": "r", "refusal": None},
        ],
        "tools": json.dumps([TOOL]),
        "chat_template_kwargs": {"message": True},
        "max_tokens": 3,
        "n": 2,
        "finish_reason": "length",
    },
)
ODD: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [{}], {"a": None}, "[", "{}", "[1]", "\ud800", '{"a": "\\ud800"}'),
    *("</think>", "{% generation %}", "{{ 1 // 0 }}", "<|im_end|>", json.loads("[" * 200 + "]" * 200)),
)


def hostile(rng: random.Random) -> Any:
    return rng.choice((rng.choice(STRINGS), rng.choice(INTS), rng.choice(FLOATS), *rng.choices(ODD, k=4)))


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy of a row with one value in it replaced, removed, renamed or repeated."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return hostile(rng)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        changed = [] if rng.random() < 0.1 else [mutated(value[at], rng)] * rng.choice((1, 1, 1, 2))
        return [*value[:at], *changed, *value[at + 1 :]]
    name, copy = rng.choice(list(value)), dict(value)
    match rng.randrange(8):
        case 0:
            del copy[name]
        case 1:
            copy[rng.choice(("name", "weight", "reasoning", "thinking", "images", "role", "x"))] = hostile(
                rng
            )
        case _:
            copy[name] = mutated(value[name], rng)
    return copy


def line_of(values: Any) -> InputLine:
    return InputLine(number=0, line_number=1, data=json.dumps(values).encode(), digest="", end=0)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for template in (PLAIN, TOOLS):
        path = make_tokenizer(sentences(50, seed=3), tmp_path_factory.mktemp("tokenizer"), 300)
        (path / "chat_template.jinja").write_text(template)
        made.append(path)
    return made


def test_a_row_is_read_or_refused_by_name(directories: list[Path]) -> None:
    from transformers import AutoTokenizer

    codecs = [TextCodec.load(str(path)) for path in directories]
    encoders = [RowEncoder(AutoTokenizer.from_pretrained(path), completion_only=True) for path in directories]
    count, refused, read = scaled(300, 20_000), Counter[str](), Counter[str]()
    reasons: set[Reason] = set()
    for number in range(count):
        rng = random.Random(f"{SEED}/row/{number}")
        values = mutated(rng.choice(GOOD), rng)
        if rng.random() < 0.3:
            values = mutated(values, rng)
        if not isinstance(values, dict):
            continue
        which = rng.randrange(2)
        batch: list[PromptRow] = [
            plain_row(line_of(values), Sampling(), chat=rng.random() < 0.5),
            openai_row(
                line_of({"custom_id": "1", "url": "/v1/chat/completions", "body": values}),
                Sampling(),
                max_tokens=5,
                resolve_adapter=lambda _: "",
            ),
        ]
        for row in batch:
            refused["batch"] += row.error is not None
            for prompt in row.prompts:
                if not prompt.HasField("conversation"):
                    continue
                turns = from_wire(prompt.conversation)
                assert to_wire(turns) == prompt.conversation
                try:
                    codecs[which].render(turns)
                    read["teacher"] += 1
                except StillhouseError as error:
                    refused["teacher"] += 1
                    reasons.add(error.reason)
        try:
            token_ids, mask = encoders[which].encode(
                DatasetRow(path=Path("rows.jsonl"), number=1, values=values)
            )
            assert len(token_ids) == len(mask)
            read["training"] += 1
        except StillhouseError as error:
            refused["training"] += 1
            reasons.add(error.reason)
    show("rows", iter([f"{count} cases; read {dict(read)}, refused {dict(refused)}"]))
    assert reasons == {Reason.INVALID_REQUEST, Reason.DATASET_INVALID}
    assert min(read["teacher"], read["training"], refused["teacher"], refused["training"]) > count // 100
