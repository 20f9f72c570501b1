"""Prompts that teachers alone see: their tokens stand for the student's, exactly, or a row is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import DataConfig, DatasetConfig, EvaluationConfig
from stillhouse.student_trainer.config.teacher import TeacherConfig, TeacherMessageConfig, TeacherPromptConfig
from stillhouse.student_trainer.train.data.corpus import load_corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.teacher.query import TeacherQuery
from tests.protos.rows.chat_templates import PLAIN
from tests.support.small_models import make_tokenizer
from tests.support.texts import sentences

SECRET = "The code is 4711."
ASK, ANSWER = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}
ROW: dict[str, Any] = {"messages": [ASK, ANSWER], "hint": SECRET}
SYSTEM = f"<|im_start|>system\n{SECRET}<|im_end|>\n"
TURN = "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n"
SWITCHED = PLAIN.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}",
)
OPENED = PLAIN.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(sentences(100, seed=3), tmp_path_factory.mktemp("tokenizer"), 400)


class Reader:
    """Encodes rows with the prompts of teachers."""

    def __init__(self, directory: Path, root: Path, template: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.tokenizer.chat_template = template
        self._path = root / "rows.jsonl"

    def read(
        self, rows: list[dict[str, Any]], *prompts: TeacherPromptConfig | None, **data: Any
    ) -> list[Example]:
        self._path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(train=(DatasetConfig(path=str(self._path)),), eval_fraction=0.0, **data)
        names = ["", "b", "c"]
        teachers = [TeacherConfig(name=name, prompt=each) for name, each in zip(names, prompts, strict=False)]
        corpus = load_corpus(
            config, EvaluationConfig(), self.tokenizer, self._path.parent, names, prompted=teachers
        )
        return list(corpus.train)

    def texts(self, example: Example, teacher: str = "") -> tuple[str, str]:
        """The ids that the teacher sees before the first scored token, and from there."""
        query = TeacherQuery.from_example(example).behind_prompt(teacher)
        ids, start = query.token_ids, query.start
        np.testing.assert_array_equal(ids[start:], example.token_ids[example.start :])
        return self.tokenizer.decode(ids[:start]), self.tokenizer.decode(ids[start:])

    def refusal(self, rows: list[dict[str, Any]], prompt: TeacherPromptConfig, **data: Any) -> str:
        with pytest.raises(StillhouseError) as caught:
            self.read(rows, prompt, **data)
        assert caught.value.reason is Reason.DATASET_INVALID
        return caught.value.message


@pytest.fixture
def reader(directory: Path, tmp_path: Path) -> Reader:
    return Reader(directory, tmp_path, PLAIN)


def prompt(**fields: Any) -> TeacherPromptConfig:
    messages = tuple(TeacherMessageConfig(**each) for each in fields.pop("messages", ()))
    return TeacherPromptConfig(messages=messages, **fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"system": SECRET}, SYSTEM + TURN),
        ({"system": "{{ hint }}"}, SYSTEM + TURN),
        ({"template": "{{ row_prompt }} {{ hint }}"}, TURN.replace("Rain?", f"Rain? {SECRET}")),
        ({"template": "{{ row_prompt }} {{ row_completion }}"}, TURN.replace("Rain?", "Rain? Yes.")),
        ({"system": SECRET, "template": "{{ row_prompt }}"}, SYSTEM + TURN),
        (
            {"messages": [{"role": "system", "content": SECRET}, {"role": "user", "content": "Rain?"}]},
            SYSTEM + TURN,
        ),
        ({"messages_field": "seen"}, SYSTEM + TURN),
    ],
)
def test_the_teacher_sees_its_prompt_and_the_student_its_own(
    reader: Reader, fields: dict[str, Any], expected: str
) -> None:
    row = ROW | {"seen": [{"role": "system", "content": SECRET}, ASK]}
    (example,) = reader.read([row], prompt(**fields))
    assert reader.texts(example) == (expected, "Yes.<|im_end|>\n")
    assert reader.tokenizer.decode(example.token_ids) == TURN + "Yes.<|im_end|>\n"
    assert reader.tokenizer.decode(example.prompt_for("")) == expected


def test_a_system_message_of_the_row_gives_way(reader: Reader) -> None:
    (example,) = reader.read([ROW | {"system": "Be brief."}], prompt(system=SECRET))
    assert reader.texts(example)[0] == SYSTEM + TURN


def test_template_arguments_are_the_teachers_alone(directory: Path, tmp_path: Path) -> None:
    reader = Reader(directory, tmp_path, SWITCHED)
    (example,) = reader.read([ROW], prompt(chat_template_kwargs='{"enable_thinking": false}'))
    assert reader.texts(example) == (TURN + "<think></think>", "Yes.<|im_end|>\n")
    assert "think" not in reader.tokenizer.decode(example.token_ids)
    told = reader.refusal([ROW], prompt(chat_template_kwargs='{"enable_thoughts": false}'))
    assert "teachers[0].prompt (chat_template_kwargs.enable_thoughts): is not read" in told


def test_an_opening_that_turns_begin_with_stays_with_the_completion(directory: Path, tmp_path: Path) -> None:
    reader = Reader(directory, tmp_path, OPENED)
    (example,) = reader.read([ROW], prompt(system=SECRET))
    student = reader.tokenizer.decode(example.token_ids)
    before, after = reader.texts(example)
    assert before + after == SYSTEM + student


def test_plain_rows_take_a_template(reader: Reader) -> None:
    row = {"prompt": "Is it wet? ", "completion": "Yes, very.", "hint": SECRET}
    (example,) = reader.read([row], prompt(template="{{ hint }} {{ prompt }}"))
    assert reader.texts(example) == (f"{SECRET} Is it wet? ", "Yes, very.<|endoftext|>")
    assert "teachers[0].prompt: makes turns" in reader.refusal([row], prompt(system=SECRET))
    assert reader.texts(reader.read([row], prompt(system=SECRET), chat=True)[0])[0].startswith(SYSTEM)
    (without,) = reader.read([{"prompt": "", "completion": "Yes, very."}], prompt(template="Is it wet? "))
    assert without.start == 1
    query = TeacherQuery.from_example(without).behind_prompt("")
    assert reader.tokenizer.decode(query.token_ids) == "Is it wet? Yes, very.<|endoftext|>"


def test_a_prompt_equal_to_the_students_changes_no_query(reader: Reader) -> None:
    rows: list[dict[str, Any]] = [ROW | {"system": "Be brief."}, {"prompt": "Is it  ", "completion": " wet?"}]
    plain = {"template": "{{ row_prompt }}"}
    for row, fields in ((rows[0], plain), (rows[0], plain | {"system": "Be brief."}), (rows[1], plain)):
        (example,) = reader.read([row], prompt(**fields))
        query = TeacherQuery.from_example(example)
        theirs = query.behind_prompt("")
        np.testing.assert_array_equal(theirs.token_ids, query.token_ids)
        assert theirs.start == query.start


def test_every_teacher_has_its_own_and_a_routed_row_that_of_its_teacher(reader: Reader) -> None:
    prompts = (prompt(system="One."), None, prompt(system="Three."))
    (example,) = reader.read([ROW], *prompts)
    assert set(example.teacher_prompts) == {"", "c"}
    assert "Three." in reader.texts(example, "c")[0]
    (routed,) = reader.read([ROW | {"who": "c"}], *prompts, teacher_field="who")
    assert set(routed.teacher_prompts) == {"c"}


def test_several_completions_keep_their_later_turns_behind_a_system_prompt(
    reader: Reader, directory: Path, tmp_path: Path
) -> None:
    row = {"messages": [ASK, ANSWER, ASK, {"role": "assistant", "content": "No."}]}
    (example,) = reader.read([row], prompt(system=SECRET))
    assert reader.texts(example) == (SYSTEM + TURN, f"Yes.<|im_end|>\n{TURN}No.<|im_end|>\n")
    assert reader.tokenizer.decode(example.prompt_for("")) == SYSTEM + f"{TURN}Yes.<|im_end|>\n{TURN}"
    assert "this row has several" in reader.refusal([row], prompt(template="{{ row_prompt }}"))
    counting = PLAIN.replace("{{ message['role'] }}\n", "{{ message['role'] }} {{ loop.index }}\n").replace(
        "assistant\n", "assistant {{ messages | length + 1 }}\n"
    )
    counted = Reader(directory, tmp_path, counting)
    assert "changes the turns behind the first completion" in counted.refusal([row], prompt(system=SECRET))


@pytest.mark.parametrize(
    ("fields", "row", "told"),
    [
        (
            {"template": "{{ hint }} {{ row_prompt }}"},
            {"messages": [ASK, ANSWER]},
            "prompt.template: cannot be rendered: 'hint' is undefined",
        ),
        ({"template": "{{ hint }}"}, {"messages": [ASK, ANSWER], "hint": None}, "'hint' is undefined"),
        ({"template": "{{ 1 / 0 }}"}, ROW, "division by zero"),
        ({"template": "{{ ''.__class__ }}"}, ROW, "prompt.template: cannot be rendered: access to attribute"),
        ({"template": "{{ ''.__class__ }}"}, ROW, "of 'str' object is unsafe. Correct the template"),
        (
            {"template": "{{ 'a' * 10**10 }}"},
            ROW,
            "it repeats a text to more than 16777216 characters. Correct",
        ),
        ({"template": "{{ 10**10 * [row_prompt] }}"}, ROW, "it repeats a text to more than"),
        ({"template": "{{ 9**99999999 }}"}, ROW, "it computes a number of more than 65536 bits"),
        ({"template": "{{ row_prompt.ljust(10**10) }}"}, ROW, "it calls with a number above"),
        ({"template": "{{ row_prompt | center(10**10) }}"}, ROW, "it calls with a number above"),
        ({"template": "{{ '%9999999999d' % 7 }}"}, ROW, "it formats with a width of more than"),
        ({"template": "{{ '{:9999999999}'.format(7) }}"}, ROW, "it formats with a width of more than"),
        ({"template": "{{ '%9999999999d' | format(7) }}"}, ROW, "it formats with a width of more than"),
        ({"messages_field": "seen"}, ROW, "prompt.messages_field, seen: is missing"),
        ({"messages_field": "messages"}, ROW, "is a turn of the assistant"),
        ({"system": SECRET}, {"text": "Rain."}, "has no place in a row of text"),
        ({"template": "{{ hint }}"}, {"prompt": "a", "completion": "b", "hint": ""}, "is empty for this row"),
    ],
)
def test_a_row_without_an_exact_prompt_is_refused_by_file_row_and_field(
    reader: Reader, fields: dict[str, Any], row: dict[str, Any], told: str
) -> None:
    message = reader.refusal([row], prompt(**fields))
    assert "rows.jsonl, row 1" in message
    assert "teachers[0].prompt" in message
    assert told in message


def test_usual_steps_of_a_template_are_not_refused(reader: Reader) -> None:
    template = "{{ 'ab' * 2 }} {{ '%03d' % 7 }} {{ '{:*^5}'.format('x') }} {{ 'x' | center(3) }} {{ 2 ** 10 }} {{ row_prompt }}"
    (example,) = reader.read([ROW], prompt(template=template))
    assert "abab 007 **x**  x  1024" in reader.tokenizer.decode(example.prompt_for(""))


def test_a_template_that_loops_is_ended(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.protos.tokenizers.bounded_rendering.RENDER_S", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert "still runs after 0.2 s" in reader.refusal([ROW], prompt(template=endless))


def test_a_limit_counts_the_prompt_and_treats_rows_as_overflow_says(reader: Reader) -> None:
    (whole,) = reader.read([ROW], prompt(system=SECRET))
    length = len(whole.prompt_for("")) + len(whole.token_ids) - whole.start
    limited = prompt(system=SECRET, max_sequence_tokens=length - 2)
    (cut,) = reader.read([ROW], limited)
    assert len(cut.token_ids) == len(whole.token_ids) - 2
    assert len(TeacherQuery.from_example(cut).behind_prompt("").token_ids) == length - 2
    short = {"messages": [ASK, {"role": "assistant", "content": "."}]}
    assert len(reader.read([ROW, short], limited, overflow="drop")) == 1
    # The field that decides is named, and data.max_sequence_tokens would not help.
    for settings, least in (({"overflow": "drop"}, length - 2), ({}, 1)):
        told = reader.refusal([ROW], prompt(system=SECRET, max_sequence_tokens=least), **settings)
        assert "of its 1 rows 1 have" in told
        assert "teachers[].prompt.max_sequence_tokens" in told
        assert "data.max_sequence_tokens" not in told
    told = reader.refusal([ROW], limited, max_sequence_tokens=4)
    assert "1 have no target within 4 tokens: raise data.max_sequence_tokens" in told


def test_a_field_that_a_prompt_reads_is_a_known_one(reader: Reader) -> None:
    assert reader.read([ROW], prompt(template="{{ hint }}"), extra_fields="refuse")
    assert "field hint: is no field of a row" in reader.refusal(
        [ROW], prompt(system="x"), extra_fields="refuse"
    )
