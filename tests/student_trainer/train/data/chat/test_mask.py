"""The assistant's turns and their ends are learnt, and nothing of others, with templates as models have them, by structure."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.train.data.encoding import RowEncoder
from stillhouse.student_trainer.train.data.readers import DatasetRow
from tests.student_trainer.train.data.tiny_tokenizers import byte_level, sentence_piece

MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
    "<think>",
    "</think>",
)
CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = "{% for m in messages %}" + CHATML_TURN + "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NEXT_OPENING = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
END_OF_ALL = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
TEXT_ONLY = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}" + PROMPT
)
OPENS_THOUGHT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
AFTER_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>"
    "{% if m.reasoning_content %}\n{{ m.reasoning_content }}\n{% endif %}</think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TWO_ENDS = (
    "{% for m in messages %}<|{{ m.role }}|><|im_start|>{{ m.content }}<|im_end|><|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><|im_start|>{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
)
OTHER_LAST_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% if loop.last %}<|end|>{% else %}<|im_end|>{% endif %}{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}\n{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "I am."},
]


def _encoder(template: Any, tokenizer: Any = None, **options: Any) -> RowEncoder:
    tokenizer = tokenizer or byte_level(MARKS, bos="<s>")
    tokenizer.chat_template = template
    return RowEncoder(tokenizer, completion_only=True, **options)


def _learnt(encoder: RowEncoder, messages: Any = TURNS, **fields: Any) -> list[str]:
    """Returns the pieces of the text that are learnt."""
    row = DatasetRow(path=Path("rows.jsonl"), number=3, values={"messages": messages, **fields})
    token_ids, mask = encoder.encode(row)
    pieces: list[list[int]] = []
    for at, (token, inside) in enumerate(zip(token_ids, mask, strict=True)):
        if inside and not mask[at - 1]:
            pieces.append([])
        if inside:
            pieces[-1].append(token)
    return [encoder._tokenizer.decode(piece) for piece in pieces]


def _ends(encoder: RowEncoder) -> list[str]:
    return [str(encoder._tokenizer.convert_ids_to_tokens(each)) for each in encoder.end_ids]


@pytest.mark.parametrize(
    ("template", "learnt", "ends"),
    [
        pytest.param(
            CHATML + PROMPT, ["Yes.<|im_end|>", "I am.<|im_end|>"], ["<|im_end|>"], id="marks without a role"
        ),
        pytest.param(
            NEXT_OPENING, ["Yes.<|user|>", "I am.<|user|>"], ["<|user|>"], id="the next opening ends"
        ),
        pytest.param(
            END_OF_ALL, ["Yes.<|end|>", "I am.<|end|>"], ["<|end|>"], id="an end of the conversation"
        ),
        pytest.param(INST, [" Yes. </s>", " I am. </s>"], ["</s>"], id="the end token after a space"),
        pytest.param(TEXT_ONLY, ["Yes.\n\n", "I am.\n\n</s>"], ["</s>"], id="no token at all"),
        pytest.param(MARKED, ["Yes.<|im_end|>", "I am.<|im_end|>"], ["<|im_end|>"], id="generation marks"),
        pytest.param(
            THINKING, ["<think>\n\n</think>\n\nI am.<|im_end|>"], ["<|im_end|>"], id="strips history"
        ),
        pytest.param(OPENS_THOUGHT, ["Yes.</s>", "I am.</s>"], ["</s>"], id="prompts with a thought"),
        pytest.param(
            "{% if add_generation_prompt %}Go on: {% endif %}" + CHATML + PROMPT,
            ["Yes.<|im_end|>", "I am.<|im_end|>"],
            ["<|im_end|>"],
            id="a prompt that is no continuation",
        ),
        pytest.param(
            "{% for m in messages %}" + CHATML_TURN + "{% endfor %}{{ eos_token }}",
            ["Yes.<|im_end|>", "I am.<|im_end|>"],
            ["<|im_end|>"],
            id="an end of all and no prompt",
        ),
        pytest.param(
            "{% for m in messages %}{{ bos_token }}" + CHATML_TURN + "{% endfor %}" + PROMPT,
            ["<s><|im_start|>assistant\nYes.<|im_end|>", "<s><|im_start|>assistant\nI am.<|im_end|>"],
            ["<|im_end|>"],
            id="a beginning that the prompt lacks",
        ),
        pytest.param(
            "{{ messages | length }}" + CHATML, ["I am.<|im_end|>"], ["<|im_end|>"], id="counts turns"
        ),
    ],
)
def test_turns_are_learnt_with_their_ends(template: str, learnt: list[str], ends: list[str]) -> None:
    encoder = _encoder(template)
    assert _learnt(encoder) == learnt
    assert _ends(encoder) == ends


def test_turns_that_the_template_rewrites_are_counted() -> None:
    encoder = _encoder(THINKING)
    answer = {"role": "assistant", "content": "I am.", "reasoning_content": "Hm."}
    assert _learnt(encoder, [*TURNS[:3], answer]) == ["<think>\nHm.\n</think>\n\nI am.<|im_end|>"]
    assert _learnt(encoder, TURNS[:2]) == ["<think>\n\n</think>\n\nYes.<|im_end|>"]
    assert encoder.notes == {"rewritten_turns": 1}
    encoder = _encoder(OPENS_THOUGHT)
    assert (
        _learnt(encoder, [*TURNS[:3], {"role": "assistant", "content": "<think>Hm.</think>I am."}])[1]
        == "I am.</s>"
    )
    assert encoder.notes == {"unprompted_turns": 2}
    marked = THINKING.replace("{% if loop", "{% generation %}{% if loop").replace(
        "<|im_end|>\n{% else", "<|im_end|>{% endgeneration %}\n{% else"
    )
    encoder = _encoder(marked)
    assert _learnt(encoder) == ["<think>\n\n</think>\n\nI am.<|im_end|>"]
    assert encoder.notes == {"rewritten_turns": 1}


@pytest.mark.parametrize(
    "template", [MARKED, CHATML, NEXT_OPENING, INST, END_OF_ALL, TEXT_ONLY, TWO_ENDS, OTHER_LAST_END]
)
def test_a_truncated_turn_teaches_no_end(template: str) -> None:
    *_, last = _learnt(_encoder(template), finish_reason="length")
    assert last.lstrip() == "I am."


def test_a_block_that_ends_on_dropped_white_space_masks_nothing_behind_it() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "</s>", "Hi", "Yes", "Sure", "I", "am", "?", ".", ":", "user", "assistant"]
    words_only = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    words_only.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, unk_token="[UNK]", eos_token="</s>")
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
        "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    assert _learnt(_encoder(template, tokenizer)) == ["Yes .", "I am ."]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}" + CHATML_TURN + "{% endgeneration %}{% endfor %}",
        "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}",
        "{% for m in messages | reverse %}" + CHATML_TURN + "{% endfor %}",
    ],
)
def test_a_mask_that_covers_others_is_refused(template: str) -> None:
    with pytest.raises(
        StillhouseError, match=r"other text than the assistant's|before turns that precede it"
    ) as error:
        _learnt(_encoder(template))
    assert error.value.reason is Reason.DATASET_INVALID
    assert error.value.message.startswith("rows.jsonl, row 3, field messages")


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for m in messages %}{{ m.content }", "template is broken"),
        ("{% include 'turns.jinja' %}", r"template is broken .* data.chat_template"),
        (
            "{{ raise_exception('No system here.') }}",
            "refused by .*: No system here. Change the row, or give",
        ),
        ("{{ messages[0].sender.name }}", "refused by .*sender"),
    ],
)
def test_a_template_that_fails_is_told_from_one_that_refuses_the_row(template: str, sentence: str) -> None:
    with pytest.raises(StillhouseError, match=sentence):
        _learnt(_encoder(template))


def test_a_template_that_drops_the_answer_is_refused() -> None:
    dropped = CHATML.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}")
    with pytest.raises(StillhouseError, match=r"messages\[1\].content: leaves no trace in the text"):
        _learnt(_encoder(dropped + PROMPT))


def test_a_role_name_without_a_generation_prompt_is_not_learnt() -> None:
    after_tool = (
        "{% if add_generation_prompt and messages[-1].role == 'user' %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        TURNS[3],
    ]
    template = CHATML.replace("{{ m.content }}", "{{ m.content or m.tool_calls | tojson }}") + after_tool
    called, answered = _learnt(_encoder(template), turns)
    assert '"arguments": {"x": 1}' in called
    assert answered == "I am.<|im_end|>"


def test_conversations_meet_sentencepiece_without_a_space() -> None:
    tokenizer = sentence_piece("metaspace_first", ["[INST]", "[/INST]"])
    encoder = _encoder(INST, tokenizer)
    row = DatasetRow(path=Path("a"), number=1, values={"messages": TURNS[:2]})
    token_ids, mask = encoder.encode(row)
    prompt = tokenizer("<s>[INST] Hi? [/INST]", add_special_tokens=False)["input_ids"]
    assert token_ids[: mask.index(True)] == prompt
    assert tokenizer.convert_ids_to_tokens(token_ids)[-1] == "</s>"


def test_named_templates_take_the_default_or_that_of_tools() -> None:
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    ]
    with_tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML + PROMPT
    encoder = _encoder({"tool_use": with_tools, "rag": "", "default": NEXT_OPENING})
    assert _learnt(encoder) == ["Yes.<|user|>", "I am.<|user|>"]
    assert _learnt(encoder, tools=tools) == ["Yes.<|im_end|>", "I am.<|im_end|>"]
    assert _learnt(_encoder({"tool_use": with_tools, "rag": ""})) == ["Yes.<|im_end|>", "I am.<|im_end|>"]
    assert _learnt(_encoder({"chat": MARKED})) == ["Yes.<|im_end|>", "I am.<|im_end|>"]
    with pytest.raises(
        StillhouseError, match=r"named default or tool_use, and those of .* are named rag, sql; rename"
    ):
        _learnt(_encoder({"rag": CHATML, "sql": CHATML}))


def test_templates_are_told_the_date_of_the_run() -> None:
    encoder = _encoder("{{ strftime_now('%d %b %Y') }}\n" + CHATML + PROMPT, today=date(2024, 7, 26))
    row = DatasetRow(path=Path("a"), number=1, values={"messages": TURNS})
    assert encoder._tokenizer.decode(encoder.encode(row)[0]).startswith("26 Jul 2024\n<|im_start|>user")
