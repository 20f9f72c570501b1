"""Calls of tools come out of the text of a model that writes them, at once, in a stream and in a batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.client.api import Teacher
from stillhouse.client.batch.pipeline import BatchSettings, generate_file
from tests.client.web.conftest import start_web
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.programs import start_teacher
from tests.support.speaking_models import make_speaker

openai = pytest.importorskip("openai", reason="openai is not installed")
PIECES = (
    *("I look it up. ", "\n<tool", "_call>\n", '{"name": "weather", ', '"arguments": {"city": "Oslo"}}'),
    *("\n</tool_call>", "\n<tool_call>", '{"name": "time", "arguments": {}}', "</tool_call>"),
)
TEMPLATE = (
    '{% if tools %}<|im_start|>system\nCall as <tool_call>{"name": ..., "arguments": ...}</tool_call>:'
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    '{% for call in message.tool_calls or [] %}<tool_call>{"name": {{ call.function.name | tojson }}, '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}'
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Tells it.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "time")
]
QUESTION = {"role": "user", "content": "How is Oslo?"}
ASKED: dict[str, Any] = {"messages": [QUESTION], "tools": TOOLS, "max_tokens": 32}
CALLS = [("weather", {"city": "Oslo"}), ("time", {})]


@pytest.fixture(scope="module")
def speaker(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str, str]]:
    """OpenAI's client of a teacher that answers with calls, the model's name, and the teacher's address."""
    root = tmp_path_factory.mktemp("speaker")
    model = make_speaker(root / "model", PIECES, tokenizer_dir=models.teacher, chat_template=TEMPLATE)
    with (
        no_process_left() as mark,
        start_teacher(model, engine="hf", directory=root, environment=mark) as teacher,
        start_web(root, "127.0.0.1:1", "--teacher", teacher.target, environment=mark) as web,
        openai.OpenAI(base_url=f"{web.target}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, str(model), teacher.target


def calls_of(message: Any) -> list[tuple[str, Any]]:
    assert all(each.type == "function" and each.id for each in message.tool_calls)
    return [(each.function.name, json.loads(each.function.arguments)) for each in message.tool_calls]


def test_an_answer_has_the_calls_beside_its_text(speaker: tuple[Any, str, str]) -> None:
    client, model, _ = speaker
    [choice] = client.chat.completions.create(model=model, **ASKED).choices
    assert (choice.message.content, choice.finish_reason) == ("I look it up.", "tool_calls")
    assert calls_of(choice.message) == CALLS
    # The answer is a message of the next request, with the results of its calls.
    results = [
        {"role": "tool", "tool_call_id": each.id, "content": "4"} for each in choice.message.tool_calls
    ]
    messages = [QUESTION, choice.message.model_dump(exclude_none=True), *results]
    [again] = client.chat.completions.create(model=model, **{**ASKED, "messages": messages}).choices
    assert calls_of(again.message) == CALLS


def test_a_stream_has_them_too_and_no_text_of_them(speaker: tuple[Any, str, str]) -> None:
    client, model, _ = speaker
    parts = [each.choices[0] for each in client.chat.completions.create(model=model, stream=True, **ASKED)]
    assert "".join(each.delta.content or "" for each in parts) == "I look it up."
    told = [call for each in parts for call in each.delta.tool_calls or ()]
    assert [each.index for each in told] == [0, 1]
    assert [(each.function.name, json.loads(each.function.arguments)) for each in told] == CALLS
    assert [each.finish_reason for each in parts if each.finish_reason] == ["tool_calls"]


def test_without_tools_or_whole_calls_the_text_stays(speaker: tuple[Any, str, str]) -> None:
    client, model, _ = speaker
    for changes in ({"tool_choice": "none"}, {"max_tokens": 4}):
        [choice] = client.chat.completions.create(model=model, **{**ASKED, **changes}).choices
        assert "<tool_call>" in choice.message.content
        assert not choice.message.tool_calls


def test_a_batch_has_the_calls_of_a_chat(speaker: tuple[Any, str, str], tmp_path: Path) -> None:
    _, model, target = speaker
    row = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": model, **ASKED},
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    with Teacher(target) as teacher:
        generate_file(teacher, tmp_path / "in.jsonl", tmp_path / "out.jsonl", BatchSettings(format="openai"))
    [choice] = json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"]["choices"]
    told = [each["function"] for each in choice["message"]["tool_calls"]]
    assert [(each["name"], json.loads(each["arguments"])) for each in told] == CALLS
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I look it up.", "tool_calls")
