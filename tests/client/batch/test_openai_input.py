"""OpenAI's batch files through a real teacher: read and written in their format; an unsupported field fails its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.client.api import BatchSettings, Listeners, StillhouseError, Teacher, generate_file
from tests.client.batch.batches import alone, read, write

TOOL = {"type": "function", "function": {"name": "rain", "parameters": {}}}


def openai(name: str, body: dict[str, Any], url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def test_openais_batch_files_are_read_and_written(teacher: Teacher, adapted: str, tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "Hello"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    harmless = {"user": "u", "metadata": {"a": "b"}, "stream": False, "tools": [], "logit_bias": None}
    source = write(
        tmp_path / "in.jsonl",
        openai("chat", {"model": "gpt", "messages": turn, "max_tokens": 6, "seed": 5, "n": 2, **harmless}),
        openai("parts", {"model": adapted, "messages": parts, "max_completion_tokens": 6, "seed": 5}),
        openai("text", {"model": "gpt", "prompt": ["Ada", "Ben"], "seed": 5, "n": 2}, "/v1/completions"),
        openai(
            "ids",
            {"model": "gpt", "prompt": [5, 6], "max_tokens": 4, "seed": 5, "logprobs": 2},
            "/v1/completions",
        ),
        openai("top", {"messages": turn, "max_tokens": 6, "seed": 5, "logprobs": True, "top_logprobs": 3}),
    )
    notes: list[str] = []
    summary = generate_file(teacher, source, tmp_path / "out.jsonl", listeners=Listeners(note=notes.append))
    assert (summary.format, summary.failed) == ("openai", 0)
    assert [note.split(":")[0] for note in notes] == ['No adapter of this teacher is named "gpt"']
    rows = read(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in rows] == ["chat", "parts", "text", "ids", "top"]
    assert len({row["id"] for row in rows}) == 5
    assert all(row["error"] is None and row["response"]["status_code"] == 200 for row in rows)
    chat, adapted_chat, text, ids, top = (row["response"]["body"] for row in rows)
    hello = alone(teacher, turn)
    assert chat["object"] == "chat.completion"
    assert [choice["index"] for choice in chat["choices"]] == [0, 1]
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": hello.text, "refusal": None}
    assert chat["usage"]["completion_tokens"] == 12
    assert adapted_chat["model"] == adapted
    assert adapted_chat["choices"][0]["message"]["content"] == alone(teacher, turn, adapter=adapted).text
    written = [alone(teacher, prompt, max_new_tokens=16).text for prompt in ("Ada", "Ben")]
    assert text["object"] == "text_completion"
    assert [choice["text"] for choice in text["choices"]][::2] == written
    scored = alone(teacher, [5, 6], max_new_tokens=4, top_k_logprobs=2)
    assert scored.distributions is not None
    logprobs = ids["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx(scored.distributions.target_logprobs.tolist())
    assert [len(each) for each in logprobs["top_logprobs"]] == [2] * 4
    content = top["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in content).decode("utf-8", "replace") == hello.text
    assert [len(each["top_logprobs"]) for each in content] == [3] * 6
    assert content[0]["top_logprobs"][0]["logprob"] == max(
        each["logprob"] for each in content[0]["top_logprobs"]
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function.name is missing"),
        ({"tools": [TOOL]}, "tools leaves no trace in the text"),
        ({"tools": [TOOL], "tool_choice": "none"}, "body.tool_choice is not supported"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "body.parallel_tool_calls is not supported"),
        ({"tool_choice": "required"}, "body.tool_choice is not supported"),
        ({"functions": [{}]}, "body.functions is not supported"),
        ({"logit_bias": {"5": 1}}, "body.logit_bias is not supported"),
        ({"skip_special_tokens": False}, "body.skip_special_tokens is not supported"),
        ({"stream": True}, "body.stream is not supported"),
        ({"frequency_penalty": 0.5}, "body.frequency_penalty is not supported"),
        ({"response_format": {"type": "json_object"}}, "body.response_format is not supported"),
        ({"n": 0}, "n is 0; it must be a whole number in [1, 4096]."),
        ({"top_logprobs": 2}, "body.top_logprobs needs logprobs: true."),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'messages[0].content[0] is of type "image_url"',
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
            "messages[0].tool_calls[0] is the number 1; it must be an object.",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "mood": "mild"}]},
            "messages[0].mood is not supported.",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": "Ada"}]}, "messages[0].name leaves no trace"),
        ({"temperature": 3000}, "temperature is 3000.0."),
    ],
)
def test_an_unsupported_field_fails_its_row_by_name(
    teacher: Teacher, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    source = write(tmp_path / "in.jsonl", openai("bad", body | change), openai("good", body))
    generate_file(teacher, source, tmp_path / "out.jsonl")
    bad, good = read(tmp_path / "out.jsonl")
    assert bad["error"]["code"] == "INVALID_REQUEST"
    assert bad["error"]["message"].startswith(sentence)
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["error"]["message"] == bad["error"]["message"]
    assert good["error"] is None


def test_other_interfaces_fail_by_name(teacher: Teacher, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", openai("x", {"input": "a"}, "/v1/embeddings"))
    generate_file(teacher, source, tmp_path / "out.jsonl")
    assert 'url is the string "/v1/embeddings"' in read(tmp_path / "out.jsonl")[0]["error"]["message"]


def test_a_data_set_of_openais_rows_keeps_what_the_template_was_given(
    teacher: Teacher, tmp_path: Path
) -> None:
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    source = write(tmp_path / "in.jsonl", openai("a", {"messages": turns, "max_tokens": 4, "seed": 5}))
    generate_file(teacher, source, tmp_path / "out.jsonl", BatchSettings(as_dataset=True))
    (row,) = read(tmp_path / "out.jsonl")
    assert row["messages"][:2] == [{"role": "system", "content": "Be brief."}, turns[1]]
    with pytest.raises(StillhouseError, match="whose url says if they are chats"):
        generate_file(teacher, source, tmp_path / "other.jsonl", BatchSettings(chat=True))
    assert row["messages"][2]["content"] == alone(teacher, row["messages"][:2], max_new_tokens=4).text
