"""Chat template, its variables and tools of a run: they count as if the tokenizer and each row had them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import DataConfig, StudentConfig
from stillhouse.student_trainer.train.data.encoding import RowEncoder
from stillhouse.student_trainer.train.data.readers import DatasetRow
from stillhouse.student_trainer.train.student.student import load_tokenizer
from tests.conftest import Models
from tests.protos.rows.chat_templates import TOOLS

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ASK, ANSWER = {"role": "user", "content": "Ada?"}, {"role": "assistant", "content": "3 apples."}
THINKING = (
    "{% if enable_thinking %}[thinks]{% else %}[quick]{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
)


def encoded(models: Models, row: dict[str, Any], **data: Any) -> tuple[str, str]:
    """Returns the text of a row, and the part that is learnt."""
    settings = DataConfig(**data)
    config = StudentConfig(model=str(models.student))
    tokenizer = load_tokenizer(config, Path(), chat_template=settings.chat_template)
    ids, mask = RowEncoder.of(settings, tokenizer).encode(DatasetRow(path=Path("rows"), number=1, values=row))
    learnt = [token for token, kept in zip(ids, mask, strict=True) if kept]
    return tokenizer.decode(ids), tokenizer.decode(learnt)


def test_a_named_template_makes_alpacas_prompt(models: Models) -> None:
    row = {"prompt": [ASK], "completion": "3 apples."}
    text, learnt = encoded(models, row, chat_template="alpaca")
    assert text.startswith("Below is an instruction that describes a task.")
    assert text.endswith("### Instruction:\nAda?\n\n### Response:\n3 apples.<|endoftext|>")
    assert learnt == "3 apples.<|endoftext|>"


def test_chatml_learns_the_assistants_turns(models: Models) -> None:
    text, learnt = encoded(models, {"messages": [ASK, ANSWER]}, chat_template="chatml")
    assert text.startswith("<|im_start|>user\nAda?<|im_end|>\n<|im_start|>assistant\n3 apples.<|im_end|>")
    assert learnt == "3 apples.<|im_end|>"


def test_a_name_that_no_template_has_is_refused(models: Models) -> None:
    with pytest.raises(
        StillhouseError, match=r'data\.chat_template is "llama", which no template is called'
    ) as caught:
        encoded(models, {"messages": [ASK, ANSWER]}, chat_template="llama")
    assert caught.value.reason is Reason.INVALID_SPEC


def test_variables_of_the_run_yield_to_those_of_a_row(models: Models) -> None:
    row: dict[str, Any] = {"messages": [ASK, ANSWER]}
    run = {"chat_template": THINKING, "chat_template_kwargs": '{"enable_thinking": true}'}
    assert encoded(models, row, **run)[0].startswith("[thinks]")
    assert encoded(models, row | {"chat_template_kwargs": {"enable_thinking": False}}, **run)[0].startswith(
        "[quick]"
    )
    assert encoded(models, {"text": "Ada"}, **run)[0] == "Ada<|endoftext|>"
    run["chat_template_kwargs"] = '{"enable_thnking": true}'
    with pytest.raises(
        StillhouseError, match=r"chat_template_kwargs\.enable_thnking: is not read by the chat template"
    ):
        encoded(models, row, **run)


def test_tools_of_the_run_are_those_of_rows_without_any(models: Models) -> None:
    run = {"chat_template": TOOLS, "tools": json.dumps([TOOL])}
    assert '"name": "f"' in encoded(models, {"messages": [ASK, ANSWER]}, **run)[0]
    assert '"name": "f"' in encoded(models, {"prompt": "Ada?", "completion": "3 apples."}, **run)[0]
    assert "tools" not in encoded(models, {"messages": [ASK, ANSWER], "tools": []}, **run)[0]
    other = {"type": "function", "function": {"name": "g"}}
    text = encoded(models, {"messages": [ASK, ANSWER], "tools": [other]}, **run)[0]
    assert '"name": "g"' in text
    assert '"name": "f"' not in text
