"""Conversations of rows: OpenAI's form becomes that of templates, survives the wire, and what cannot is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import pytest

from stillhouse.protos.rows.conversation import Turns, parse_turns, with_system
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.template_fields import TemplateFields
from stillhouse.protos.rows.wire import MAX_JSON_BYTES, from_wire, to_wire
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from tests.protos.rows.chat_templates import ONE_CALL, PLAIN, THINKING, TOOLS, WITHOUT_SYSTEM

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(name: str = "weather", arguments: Any = '{"city": "Köln"}', **rest: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}, **rest}


USER = {"role": "user", "content": "Rain?"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [call()]}
ANSWER = {"role": "tool", "content": "wet", "tool_call_id": "c1", "name": "weather"}
DIALOGUE = [USER, CALLS, ANSWER]


def rendered(template: str, turns: Turns) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(template)

    def render(messages: Sequence[Mapping[str, Any]], turns: Turns) -> str:
        return compiled.render(
            messages=messages, tools=list(turns.tools) or None, add_generation_prompt=True, **turns.options
        )

    return render(TemplateFields(template, render).resolve(turns), turns)


def test_arguments_as_text_are_parsed_once_and_null_content_is_not_printed() -> None:
    text = rendered(TOOLS, parse_turns(DIALOGUE, [WEATHER]))
    assert '{"name": "weather", "arguments": {"city": "Köln"}}' in text
    assert '"description": "Weather of a city"' in text
    assert "wet" in text
    assert "None" not in text
    flat = [
        USER,
        {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Köln"}}]},
        ANSWER,
    ]
    assert rendered(TOOLS, parse_turns(flat, json.dumps([WEATHER]))) == text


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_may_have_no_arguments(arguments: Any) -> None:
    turns = parse_turns([USER, {"role": "assistant", "tool_calls": [call(arguments=arguments)]}])
    assert '"arguments": {}' in rendered(TOOLS, turns)


def test_null_stays_null_where_the_template_asks_for_it() -> None:
    template = "{% for m in messages %}{{ '<call>' if m.content is none else m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
    assert "<call>" in rendered(template, parse_turns(DIALOGUE))
    concatenates = "{% for m in messages %}{{ m.content + '.' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
    assert rendered(concatenates, parse_turns(DIALOGUE)).startswith("Rain?..[{")


def test_the_wire_keeps_every_field() -> None:
    reasoned = {"role": "assistant", "content": "Wet.", "reasoning": "It said so."}
    turns = parse_turns([{"role": "user", "content": "", "name": "Ada"}, *DIALOGUE[1:], reasoned], [WEATHER])
    message = teacher_pb2.Conversation.FromString(to_wire(turns).SerializeToString())
    again = from_wire(message)
    assert again.messages == turns.messages
    assert again.tools == turns.tools
    old = teacher_pb2.Conversation(messages=[teacher_pb2.Message(role="user", content="")])
    assert from_wire(old).messages == ({"role": "user", "content": ""},)


@pytest.mark.parametrize(
    ("template", "messages", "tools", "field"),
    [
        (PLAIN, [USER], [WEATHER], "tools"),
        (PLAIN, [USER, {**CALLS, "content": "Let me see."}, ANSWER], None, "messages[1].tool_calls"),
        (
            PLAIN,
            [USER, {"role": "assistant", "content": "a", "reasoning_content": "b"}],
            None,
            "messages[1].reasoning_content",
        ),
        (PLAIN, [{**USER, "name": "Ada"}], None, "messages[0].name"),
        (
            ONE_CALL,
            [USER, {**CALLS, "tool_calls": [call(), call("time")]}],
            None,
            "messages[1].tool_calls[1]",
        ),
        (WITHOUT_SYSTEM, [{"role": "system", "content": "Be brief."}, USER], None, "messages[0].content"),
        (
            TOOLS.replace("{{ call.arguments | tojson }}", "null"),
            DIALOGUE,
            None,
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            TOOLS.replace("{% if message.content %}", "{% if message.content and not message.tool_calls %}"),
            [USER, {**CALLS, "content": "Let me see."}, ANSWER],
            None,
            "messages[1].content",
        ),
    ],
)
def test_a_field_without_a_trace_is_refused(template: str, messages: Any, tools: Any, field: str) -> None:
    with pytest.raises(FieldError, match="leaves no trace in the text") as caught:
        rendered(template, parse_turns(messages, tools))
    assert caught.value.field == field


def test_reasoning_goes_by_the_templates_own_name_and_may_be_left_out_of_earlier_turns() -> None:
    reasoned = {"role": "assistant", "content": "Wet.", "reasoning_content": "It said so."}
    assert "[It said so.]" in rendered(THINKING, parse_turns([USER, reasoned]))
    text = rendered(TOOLS, parse_turns([USER, reasoned, USER, {**reasoned, "reasoning_content": "Again."}]))
    assert "<think>\nAgain.\n</think>" in text
    assert "It said so." not in text


def test_each_situation_of_a_turn_is_tried_once() -> None:
    count = 0

    def render(messages: Sequence[Mapping[str, Any]], turns: Turns) -> str:
        nonlocal count
        count += 1
        return json.dumps([messages, turns.tools])

    fields = TemplateFields(TOOLS, render)
    fields.resolve(parse_turns([USER, *DIALOGUE[1:] * 40], [WEATHER]))
    assert count < 40
    before = count
    fields.resolve(parse_turns([USER, *DIALOGUE[1:] * 40], [WEATHER]))
    assert count == before + 1


def test_arguments_are_text_where_the_template_takes_or_prints_them_so() -> None:
    for write in ("{{ '<' + call.function.arguments + '>' }}", "<{{ call.function.arguments }}>"):
        template = (
            "{% for m in messages %}{{ m.content or '' }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
            + write
            + "{% endfor %}{% endfor %}"
        )
        assert rendered(template, parse_turns(DIALOGUE)) == 'Rain?weather<{"city": "Köln"}>wet'


def test_a_template_may_forget_reasoning_before_the_assistants_last_turn() -> None:
    turns = parse_turns(
        [
            USER,
            {**CALLS, "reasoning": "Look."},
            ANSWER,
            {"role": "assistant", "content": "Wet.", "reasoning": "So."},
        ]
    )
    text = rendered(TOOLS, turns)
    assert "So." in text
    assert "Look." not in text


def test_options_of_a_template_are_given_to_one_that_reads_them() -> None:
    template = (
        PLAIN + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    )
    options = {"enable_thinking": False}
    assert rendered(template, parse_turns([USER], None, options)).endswith("<think></think>")
    assert from_wire(to_wire(parse_turns([USER], None, json.dumps(options)))).options == options
    for given, sentence in (
        ({"enable_thinkin": False}, "chat_template_kwargs.enable_thinkin is not read by the chat template."),
        (
            {"add_generation_prompt": False},
            'chat_template_kwargs has "add_generation_prompt", which is no variable',
        ),
        ({"eos_token": ""}, 'chat_template_kwargs has "eos_token", which is no variable'),
        ([1], "chat_template_kwargs is an array; it must be an object."),
    ):
        with pytest.raises(FieldError) as caught:
            rendered(template, parse_turns([USER], None, given))
        assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "user"}, "messages[0].content is missing; it must be a string."),
        ({"role": "assistant", "content": None}, "messages[0].content is missing; it must be a string."),
        ({"role": "user", "content": 3}, "messages[0].content is the number 3; it must be a string."),
        ({"content": "a"}, "messages[0].role is missing; it must be a string."),
        ({"role": "user", "content": "a\ud800"}, "messages[0].content has \\ud800 without its other half"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            'messages[0].content[0] is of type "image_url"; only parts of type "text" are supported.',
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": None}]},
            "messages[0].content[0].text is missing; it must be a string.",
        ),
        (
            {"role": "user", "content": "a", "tool_calls": [call()]},
            'messages[0].tool_calls is of a turn of "user"',
        ),
        (
            CALLS | {"tool_calls": [call(arguments="{")]},
            "messages[0].tool_calls[0].function.arguments is not JSON",
        ),
        (
            CALLS | {"tool_calls": [call(arguments='"{}"')]},
            "messages[0].tool_calls[0].function.arguments is JSON text inside",
        ),
        (
            CALLS | {"tool_calls": [call(arguments="[1]")]},
            "messages[0].tool_calls[0].function.arguments is an array",
        ),
        (
            CALLS | {"tool_calls": [call(arguments='{"a": NaN}')]},
            "messages[0].tool_calls[0].function.arguments cannot be",
        ),
        (
            CALLS | {"tool_calls": [call(arguments='{"a": "\\ud800"}')]},
            "messages[0].tool_calls[0].function.arguments has \\ud800",
        ),
        (
            CALLS | {"tool_calls": [call(arguments={"a": json.loads("[" * 70 + "]" * 70)})]},
            "messages[0].tool_calls[0].function.arguments is nested",
        ),
        (CALLS | {"tool_calls": [call(name="")]}, "messages[0].tool_calls[0].function.name is the string"),
        (CALLS | {"tool_calls": [call(type="custom")]}, 'messages[0].tool_calls[0].type is "custom"'),
        (CALLS | {"tool_calls": [call(custom={})]}, "messages[0].tool_calls[0].custom is not supported"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "messages[0].weight is 0.5; it must be 0"),
        ({"role": "user", "content": "a", "weight": 0}, 'messages[0].weight is of a turn of "user"'),
        ({"role": "assistant", "content": "a", "prefix": True}, "messages[0].prefix is not supported"),
        (
            {"role": "assistant", "content": "a", "reasoning": "b", "thinking": "c"},
            "messages[0].thinking differs from reasoning",
        ),
    ],
)
def test_bad_messages_are_refused_by_name(message: Any, sentence: str) -> None:
    with pytest.raises(FieldError) as caught:
        parse_turns([message])
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("tools", "sentence"),
    [
        ("[", "tools is not JSON"),
        ({"type": "function"}, "tools is an object; it must be an array"),
        ([{"type": "function", "function": {}}], "tools[0].function.name is missing"),
        ([{"type": "web_search", "name": "x"}], 'tools[0].type is "web_search"'),
        ([{**WEATHER, "x": float("nan")}], "tools[0] cannot be written as JSON"),
    ],
)
def test_bad_tools_are_refused_by_name(tools: Any, sentence: str) -> None:
    with pytest.raises(FieldError) as caught:
        parse_turns([USER], tools)
    assert str(caught.value).startswith(sentence)


def test_json_on_the_wire_has_a_limit() -> None:
    large = {**WEATHER, "x": "é" * (MAX_JSON_BYTES // 2)}
    with pytest.raises(FieldError, match="tools is JSON of more than"):
        to_wire(parse_turns([USER], [large]))
    with pytest.raises(FieldError, match="tools is JSON of more than"):
        from_wire(
            teacher_pb2.Conversation(
                messages=[teacher_pb2.Message(role="user")], tools=" " * (MAX_JSON_BYTES + 1)
            )
        )
    with pytest.raises(FieldError, match="no_content is set beside content"):
        from_wire(
            teacher_pb2.Conversation(
                messages=[teacher_pb2.Message(role="assistant", content="a", no_content=True)]
            )
        )


def test_weights_and_nulls_are_openais() -> None:
    turns = parse_turns(
        [
            USER,
            {"role": "assistant", "content": "a", "weight": 0, "refusal": None, "tool_calls": None},
            {"role": "assistant", "content": "b", "weight": 1},
        ]
    )
    assert turns.trained == (False, False, True)
    assert turns.messages[1] == {"role": "assistant", "content": "a"}


def test_a_system_prompt_beside_messages_comes_first() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert with_system([USER], "Be brief.") == with_system([system, USER], "Be brief.") == [system, USER]
    with pytest.raises(FieldError, match="system differs"):
        with_system([system, USER], "Be long.")
