"""Fields of rows in training: tools, calls, system and weights reach the text and the mask as their author meant them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.conversation import parse_turns
from stillhouse.student_trainer.config.schema import DataConfig, DatasetConfig, EvaluationConfig
from stillhouse.student_trainer.train.data.corpus import load_corpus
from stillhouse.student_trainer.train.data.encoding import RowEncoder
from stillhouse.student_trainer.train.data.readers import DatasetRow
from stillhouse.teacher_service.models.tokenizer import TextCodec
from tests.protos.rows.chat_templates import PLAIN, TOOLS
from tests.support.small_models import make_tokenizer
from tests.support.texts import sentences

TOOL = {"type": "function", "function": {"name": "rain", "description": "Rain in a city", "parameters": {}}}
ASK = {"role": "user", "content": "Rain?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "rain", "arguments": '{"in": "Köln"}'}}
    ],
}
TOLD = {"role": "tool", "content": "wet", "tool_call_id": "1"}
ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(sentences(100, seed=3), tmp_path_factory.mktemp("tokenizer"), 400)


def load(directory: Path, template: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template
    return tokenizer


def learnt(tokenizer: Any, values: dict[str, Any], **options: Any) -> tuple[str, str]:
    """Returns the complete text of a row, and the part of it that is trained on."""
    row = DatasetRow(path=Path("rows.jsonl"), number=3, values=values)
    encoder = RowEncoder(tokenizer, **{"completion_only": True} | options)
    token_ids, mask = encoder.encode(row)
    kept = [token for token, inside in zip(token_ids, mask, strict=True) if inside]
    return tokenizer.decode(token_ids), tokenizer.decode(kept)


def test_calls_are_learnt_and_their_answers_are_not(directory: Path) -> None:
    tokenizer = load(directory, TOOLS)
    text, kept = learnt(tokenizer, {"messages": [ASK, CALL, TOLD, ANSWER], "tools": json.dumps([TOOL])})
    called = '<tool_call>\n{"name": "rain", "arguments": {"in": "Köln"}}\n</tool_call><|im_end|>'
    assert kept == called + "Yes.<|im_end|>"
    assert "Rain in a city" in text
    assert "wet" in text
    with pytest.raises(StillhouseError, match="row 3, field tools: leaves no trace in the text") as caught:
        learnt(load(directory, PLAIN), {"messages": [ASK, ANSWER], "tools": [TOOL]})
    assert caught.value.reason is Reason.DATASET_INVALID


def test_student_and_teacher_render_a_row_alike(directory: Path, tmp_path: Path) -> None:
    tokenizer = load(directory, TOOLS)
    tokenizer.save_pretrained(tmp_path)
    row = {"prompt": [ASK, CALL, TOLD], "completion": [ANSWER], "tools": [TOOL], "system": "Be brief."}
    text, kept = learnt(tokenizer, row)
    messages = [{"role": "system", "content": "Be brief."}, ASK, CALL, TOLD]
    prompt = TextCodec.load(str(tmp_path)).render(parse_turns(messages, [TOOL]))
    assert kept == "Yes.<|im_end|>"
    assert text == tokenizer.decode(prompt) + "Yes.<|im_end|>\n"


def test_system_makes_turns_of_prompt_and_completion(directory: Path) -> None:
    tokenizer = load(directory, PLAIN)
    turns = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    text, kept = learnt(tokenizer, {"prompt": "a", "completion": "b", "system": "s"})
    assert (text, kept) == ("<|im_start|>system\ns<|im_end|>\n" + turns, "b<|im_end|>")
    assert learnt(tokenizer, {"prompt": "a", "completion": "b"}, chat=True) == (turns, "b<|im_end|>")
    assert learnt(tokenizer, {"prompt": "a", "completion": "b"})[0] == "ab<|endoftext|>"


def test_options_of_the_template_hold_for_their_row(directory: Path) -> None:
    switched = (
        "<|im_start|>assistant\n{% if thinking is defined and not thinking %}<think></think>{% endif %}"
    )
    template = PLAIN.replace(
        "<|im_start|>{{ message['role'] }}\n",
        "{% if message['role'] == 'user' %}<|im_start|>user\n{% else %}" + switched + "{% endif %}",
    ).replace("<|im_start|>assistant\n{% endif %}", switched + "{% endif %}")
    tokenizer, row = load(directory, template), {"messages": [ASK, ANSWER]}
    assert learnt(tokenizer, row)[0].endswith("assistant\nYes.<|im_end|>\n")
    text, kept = learnt(tokenizer, row | {"chat_template_kwargs": {"thinking": False}})
    assert text.endswith("assistant\n<think></think>Yes.<|im_end|>\n")
    assert kept == "Yes.<|im_end|>"


@pytest.mark.parametrize("marked", [False, True])
def test_a_turn_of_weight_0_is_context(directory: Path, marked: bool) -> None:
    template = PLAIN
    if marked:
        template = template.replace(
            "{{ message['content'] }}<|im_end|>",
            "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
            "{% else %}{{ message['content'] }}<|im_end|>{% endif %}",
        )
    tokenizer = load(directory, template)
    text, kept = learnt(
        tokenizer,
        {
            "messages": [
                ASK,
                {**ANSWER, "weight": 0},
                ASK,
                {"role": "assistant", "content": "No.", "weight": 1},
            ]
        },
    )
    assert text.count("Yes.") == 1
    assert kept == "No.<|im_end|>"


def test_a_run_applies_its_rule_for_unknown_fields(directory: Path, tmp_path: Path) -> None:
    tokenizer = load(directory, PLAIN)
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "b", "teacher": "t", "topic": "x"},
        {"prompt": "a", "completion": [{**ANSWER, "weight": 0}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"teacher": "t"} | row) + "\n" for row in rows))

    def read(extra_fields: str) -> int:
        data = DataConfig(
            train=(DatasetConfig(path=str(path)),),
            eval_fraction=0.0,
            teacher_field="teacher",
            extra_fields=extra_fields,
            chat=True,
        )
        return len(load_corpus(data, EvaluationConfig(), tokenizer, tmp_path, ["t"]).train)

    assert read("keep") == 1  # the other has nothing to learn
    with pytest.raises(StillhouseError, match="row 1, field topic: is no field of a row"):
        read("refuse")
