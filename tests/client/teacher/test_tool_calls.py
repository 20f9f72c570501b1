"""Formats of calls of tools: found by the chat template, taken out of text whole or in pieces, and no other text changed."""

from __future__ import annotations

import json

import pytest

from stillhouse.client.teacher.tool_calls import Format, TextSplitter, format_of, parse

HERMES = 'Look: <tool_call>{"name": ...}</tool_call> {{ tools }}'
LLAMA = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"chat_template.jinja": HERMES.encode()}, "hermes"),
        ({"chat_template.jinja": LLAMA.encode()}, "llama3_json"),
        ({"tokenizer_config.json": json.dumps({"chat_template": HERMES}).encode()}, "hermes"),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {
                        "chat_template": [
                            {"name": "default", "template": ""},
                            {"name": "tool_use", "template": HERMES},
                        ]
                    }
                ).encode()
            },
            "hermes",
        ),
        (
            {"chat_template.jinja": f"{HERMES}<function=name>".encode()},
            None,
        ),  # the same marks around another form
        ({"chat_template.jinja": b"{{ tools }}"}, None),
        ({"chat_template.jinja": b"\xff"}, None),
        ({"tokenizer_config.json": b"[]"}, None),
        ({}, None),
    ],
)
def test_the_format_is_that_of_the_template(files: dict[str, bytes], kind: Format | None) -> None:
    assert format_of(files) == kind


@pytest.mark.parametrize(
    ("kind", "text", "content", "calls"),
    [
        (
            "hermes",
            'I look. \n<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>\n<tool_call>{"name": "b"}</tool_call> done',
            "I look.\ndone",
            [("add", {"a": "é"}), ("b", {})],
        ),
        ("hermes", '<tool_call>{"name": "a", "arguments": {}}', "", [("a", {})]),  # its end token was the end
        ("hermes", ' <tool_call>{"name": "a", "arguments": []}</tool_call>', None, []),
        ("hermes", "a < b and <tool_c ", None, []),
        ("hermes", "<tool_call>{</tool_call>", None, []),
        ("hermes", "[" * 100_000, None, []),
        (
            "llama3_json",
            ' {"name": "a", "parameters": {"x": [1]}}; {"name": "b", "parameters": {}}',
            "",
            [("a", {"x": [1]}), ("b", {})],
        ),
        ("llama3_json", '{"answer": 1}', None, []),
        ("llama3_json", 'So: {"name": "a", "parameters": {}}', None, []),
        ("llama3_json", '{"name": "a", "parameters": {}} and text', None, []),
        (None, '<tool_call>{"name": "a", "arguments": {}}</tool_call>', None, []),
    ],
)
def test_text_is_taken_apart_alike_whole_and_in_pieces(
    kind: Format | None, text: str, content: str | None, calls: list[tuple[str, object]]
) -> None:
    wanted = text if content is None else content
    parsed = parse(text, kind)
    assert (parsed.content, [(each.name, json.loads(each.arguments)) for each in parsed.calls]) == (
        wanted,
        calls,
    )
    for size in (1, 2, 3, 7, len(text)):
        splitter, told = TextSplitter(kind), ""
        for begin in range(0, min(len(text), 300), size):
            told += splitter.add(text[begin : begin + size])
        told += splitter.add(text[begin + size :])
        rest = splitter.end()
        assert told + rest.content == wanted
        assert [(each.name, json.loads(each.arguments)) for each in rest.calls] == calls
