"""Tokenizer: text streamed in chunks equals text decoded at once, and nothing is taken back."""

from __future__ import annotations

import json
import random
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.conversation import parse_turns
from stillhouse.teacher_service.models.tokenizer import TOKENIZER_FILES, TextCodec
from tests.protos.rows.chat_templates import TOOLS
from tests.support.small_models import END, TURN_END, make_tokenizer
from tests.support.texts import sentences

TEXT = "Ada has 12 apples — naïve café, 日本語 and 🙂👩‍🚀 too."


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(sentences(200, seed=3), tmp_path_factory.mktemp("tokenizer"), 400)


@pytest.fixture(scope="module")
def codec(directory: Path) -> TextCodec:
    return TextCodec.load(str(directory))


def test_text_in_random_chunks_equals_text_at_once(codec: TextCodec) -> None:
    ids = codec.encode(TEXT).tolist()
    generator = random.Random(0)
    for stop in ((), ("never to be seen",), ("too.!", " and nothing")):
        for _ in range(50):
            decoder = codec.stream_decoder(stop)
            text, rest = "", ids
            while rest:
                size = generator.randint(1, 4)
                chunk, rest = rest[:size], rest[size:]
                decoded = decoder.push(chunk, final=not rest)
                assert not decoded.matched_stop
                text += decoded.text
                assert TEXT.startswith(text), "a broken character was given out"
            assert text == TEXT
            assert decoded.num_ids_kept == len(ids)


def test_a_stop_string_ends_text_and_ids_at_any_chunk_boundary(codec: TextCodec) -> None:
    ids = codec.encode(TEXT).tolist()
    generator = random.Random(1)
    for stop in (
        ("apples",),
        ("é, 日",),
        ("🙂",),
        ("tooo", "12 apples — naïve c", "café"),
        ("日本語 and 🙂👩", "語"),
    ):
        expected = min((TEXT[: TEXT.find(each)] for each in stop if each in TEXT), key=len)
        if stop == ("日本語 and 🙂👩", "語"):
            expected = TEXT[: TEXT.find("語")]  # it is complete first
        kept = set()
        for _ in range(30):
            decoder = codec.stream_decoder(stop)
            text, rest, num_ids = "", ids, 0
            while rest:
                size = generator.randint(1, 5)
                chunk, rest = rest[:size], rest[size:]
                decoded = decoder.push(chunk, final=not rest)
                text += decoded.text
                assert expected.startswith(text), "text beyond a stop string was given out"
                assert decoded.num_ids_kept >= num_ids
                num_ids = decoded.num_ids_kept
                if decoded.matched_stop:
                    break
            assert decoded.matched_stop
            assert text == expected
            kept.add(num_ids)
        assert len(kept) == 1, "how many ids are kept depends on where the chunks break"
        before = codec.stream_decoder().push(ids[: kept.pop()], final=True).text
        assert before.startswith(expected)
        assert len(before) <= len(expected) + max(map(len, stop))


def test_ids_of_a_possible_stop_string_are_withheld_until_it_is_none(codec: TextCodec) -> None:
    ids = codec.encode("one two three").tolist()
    chunks = [codec.stream_decoder().push([token], final=True).text for token in ids]
    decoder = codec.stream_decoder(("two thirteen",))
    begin = next(n for n in range(len(ids)) if "".join(chunks[: n + 1]).endswith("t"))
    decoded = decoder.push(ids[: begin + 1])
    assert decoded.text == "one "
    assert decoded.num_ids_kept <= begin
    decoded = decoder.push(ids[begin + 1 :])
    assert decoded.text == "two three"
    assert decoded.num_ids_kept == len(ids)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_special_token_stops_by_its_id(codec: TextCodec, directory: Path, chunk: int) -> None:
    before, after = codec.encode("one two thi🙂").tolist(), codec.encode(" never").tolist()
    turn_end = int(codec.encode(TURN_END)[0])
    ids = [*before[:-1], turn_end, *after]  # it cuts a character
    for stop in ((TURN_END,), (TURN_END, "two thirteen"), ("not there", TURN_END)):
        decoder, text, kept = codec.stream_decoder(stop), "", 0
        for begin in range(0, len(ids), chunk):
            decoded = decoder.push(ids[begin : begin + chunk])
            text, kept = text + decoded.text, decoded.num_ids_kept
            if decoded.matched_stop:
                break
        assert (text.rstrip("\N{REPLACEMENT CHARACTER}"), kept) == ("one two thi", len(before) - 1)
        assert decoded.matched_stop
    decoder = codec.stream_decoder((TURN_END, "two"))
    assert decoder.push(ids).text == "one "
    # The end token ends a sample by itself, and stays in its ids.
    end = int(codec.encode(END)[0])
    assert codec.stream_decoder((END,)).push([*before, end], final=True).num_ids_kept == len(before) + 1


def test_a_special_token_beside_text_in_a_stop_string_is_refused(codec: TextCodec) -> None:
    codec.check_stop([TURN_END, END, "text", "<|im"])
    with pytest.raises(StillhouseError, match="special token") as refused:
        codec.check_stop(["text", f"{TURN_END}\n"])
    assert refused.value.reason is Reason.INVALID_REQUEST


def test_an_incomplete_character_at_the_end_is_emitted_as_replacement(codec: TextCodec) -> None:
    ids = codec.encode("a🙂").tolist()
    assert len(ids) > 2
    decoder = codec.stream_decoder()
    assert decoder.push(ids[:-1]).text == "a"
    assert decoder.push([], final=True).text == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_never_become_a_character_do_not_withhold_the_text(codec: TextCodec) -> None:
    broken = codec.encode("🙂").tolist()[-1]
    decoder = codec.stream_decoder()
    texts = [decoder.push([broken]).text for _ in range(40)]
    assert sum(map(len, texts)) > 20


def test_special_tokens_have_no_text(codec: TextCodec) -> None:
    end = codec.eos_token_ids[0]
    decoded = codec.stream_decoder(("x",)).push([*codec.encode("hello").tolist(), end], final=True)
    assert decoded.text == "hello"
    assert decoded.num_ids_kept == len(codec.encode("hello")) + 1


def test_the_sample_completes_a_character_of_the_prompt(codec: TextCodec) -> None:
    ids = codec.encode("well 🙂!").tolist()
    split = len(codec.encode("well ")) + 1
    decoder = codec.stream_decoder((), context=ids[:split])
    assert "".join(decoder.push([token]).text for token in ids[split:]) == "🙂!"


def test_conversations_are_rendered_by_the_template(codec: TextCodec) -> None:
    ids = codec.render(parse_turns([{"role": "user", "content": "hi"}]))
    end = codec.encode(TURN_END).tolist()
    assert len(end) == 1
    assert end[0] in ids.tolist()
    assert codec.stream_decoder().push(ids, final=True).text == "user\nhi\nassistant\n"
    assert codec.chat_template_fingerprint


def test_a_model_without_a_template_takes_no_conversation(directory: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    codec = TextCodec.load(str(tmp_path))
    assert codec.chat_template_fingerprint == ""
    with pytest.raises(StillhouseError, match="no chat template") as caught:
        codec.render(parse_turns([{"role": "user", "content": "hi"}]))
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_a_template_that_refuses_is_a_bad_request(directory: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(StillhouseError, match="Roles must alternate"):
        TextCodec.load(str(tmp_path)).render(parse_turns([{"role": "user", "content": "hi"}]))


def test_generation_settings_that_are_no_object_are_refused_by_name(directory: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(["settings"] * 20))
    with pytest.raises(
        StillhouseError, match=r'generation_config\.json that holds \["settings", .*…, not an'
    ) as caught:
        TextCodec.load(str(tmp_path))
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}
CALLING = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "rain", "arguments": '{"in": "Köln"}'}}],
    },
    {"role": "tool", "content": "wet"},
]


def test_tools_and_calls_are_rendered_or_refused(directory: Path, codec: TextCodec, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TOOLS)
    knowing = TextCodec.load(str(tmp_path))
    text = knowing.stream_decoder().push(knowing.render(parse_turns(CALLING, [TOOL])), final=True).text
    assert '{"name": "rain", "arguments": {"in": "Köln"}}' in text
    assert '"parameters"' in text
    for turns, field in (
        (parse_turns(CALLING[:1], [TOOL]), "tools"),
        (parse_turns(CALLING), "messages[1].tool_calls"),
    ):
        with pytest.raises(StillhouseError) as caught:
            codec.render(turns)
        assert caught.value.reason is Reason.INVALID_REQUEST
        assert caught.value.message.startswith(f"{field} leaves no trace in the text")


def test_any_failure_of_a_template_is_a_bad_request(directory: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    for template in (
        "{{ messages[0].content / 0 }}",
        "{{ 1 // 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(StillhouseError, match="chat template refuses"):
            TextCodec.load(str(tmp_path)).render(parse_turns(CALLING[:1]))


@pytest.mark.parametrize(
    "template",
    [
        {"rag": "", "default": "U:{{ messages[0].content }} A:", "tool_use": "T:"},
        {"tool_use": "U:{{ messages[0].content }} A:", "rag": ""},
        "U:{% for part in messages[0].content %}{{ part.text }}{% endfor %} A:",
    ],
    ids=["several", "no default", "text in parts"],
)
def test_templates_by_name_and_templates_of_parts_are_rendered(directory: Path, template: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template
    codec = TextCodec(tokenizer, directory)
    ids = codec.render(parse_turns([{"role": "user", "content": "Hello"}]))
    assert tokenizer.decode(ids) == "U:Hello A:"


def test_only_tokenizer_files_leave_the_host(directory: Path, codec: TextCodec) -> None:
    (directory / "secret.json").write_text("{}")
    (directory / "modeling.py").write_text("raise SystemExit")
    files = dict(codec.files())
    assert set(files) <= set(TOKENIZER_FILES)
    assert json.loads(files["tokenizer.json"])["model"]["type"] == "BPE"


def test_tokenizer_size_and_end_tokens(codec: TextCodec) -> None:
    assert codec.tokenizer_size == 400
    assert codec.eos_token_ids == tuple(codec.encode(END).tolist())


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError) as caught:
        TextCodec.load(str(tmp_path))
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    with pytest.raises(StillhouseError) as caught:
        TextCodec.load("nobody/no-such-model")
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma"])
def test_a_tokenizer_that_transformers_makes_up_is_none(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(StillhouseError, match="its files hold no vocabulary") as refused:
        TextCodec.load(str(tmp_path))
    assert refused.value.reason is Reason.MODEL_NOT_FOUND


def test_a_template_that_asks_for_the_date_is_told_the_day_of_the_request(directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}|{{ messages[0].content }}"
    turns, day = parse_turns([{"role": "user", "content": "Hello"}]), date(2024, 7, 26)
    assert tokenizer.decode(TextCodec(tokenizer, directory).render(turns, today=day)) == "26 Jul 2024|Hello"
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer.decode(TextCodec(tokenizer, directory).render(turns, today=day)) == "Hello"
