"""Rows, masks, split and order: exactly the completions are trained on, and deterministically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import (
    DataConfig,
    DatasetConfig,
    EvaluationConfig,
    OptimizerConfig,
)
from stillhouse.student_trainer.train.data.corpus import Corpus, load_corpus
from stillhouse.student_trainer.train.data.encoding import RowEncoder
from stillhouse.student_trainer.train.data.readers import DatasetRow
from stillhouse.student_trainer.train.data.schedule import Schedule
from tests.conftest import Models


@pytest.fixture(scope="module")
def tokenizer(models: Models) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models.student)


def _row(**values: Any) -> DatasetRow:
    return DatasetRow(path=Path("rows.jsonl"), number=3, values=values)


def _learnt(tokenizer: Any, row: DatasetRow, *, completion_only: bool = True) -> tuple[str, str]:
    """Returns the complete text of a row, and the part of it that is trained on."""
    token_ids, mask = RowEncoder(tokenizer, completion_only=completion_only).encode(row)
    assert len(token_ids) == len(mask)
    assert not mask[0]
    learnt = [token for token, kept in zip(token_ids, mask, strict=True) if kept]
    return tokenizer.decode(token_ids), tokenizer.decode(learnt)


def test_prompt_and_completion_learns_the_completion_and_its_end(tokenizer: Any) -> None:
    text, learnt = _learnt(tokenizer, _row(prompt="Ada has ", completion="3 apples."))
    assert text == "Ada has 3 apples.<|endoftext|>"
    assert learnt == "3 apples.<|endoftext|>"


def test_prompt_is_encoded_as_at_inference(tokenizer: Any) -> None:
    token_ids, mask = RowEncoder(tokenizer, completion_only=True).encode(
        _row(prompt="Ada h", completion="as")
    )
    assert token_ids[: mask.index(True)] == tokenizer("Ada h")["input_ids"]


def test_text_learns_all_tokens_but_the_first(tokenizer: Any) -> None:
    token_ids, mask = RowEncoder(tokenizer, completion_only=True).encode(_row(text="Ada has 3 apples."))
    assert mask == [False] + [True] * (len(token_ids) - 1)
    assert tokenizer.decode(token_ids) == "Ada has 3 apples.<|endoftext|>"


CONVERSATION = [
    {"role": "user", "content": "Wie viele Äpfel? 🍎\n"},
    {"role": "assistant", "content": " \nDrei Äpfel 🍏."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes.\n"},
]


def test_messages_learn_the_assistants_turns_with_their_end_marks(tokenizer: Any) -> None:
    text, learnt = _learnt(tokenizer, _row(messages=CONVERSATION))
    assert text.count("<|im_start|>") == 4
    assert learnt == " \nDrei Äpfel 🍏.<|im_end|>Yes.\n<|im_end|>"


def test_a_template_that_marks_generation_decides_itself(models: Models) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.student)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}A:{% generation %}{{ message['content'] }}"
        "{{ eos_token }}{% endgeneration %}{% else %}U:{{ message['content'] }}\n{% endif %}{% endfor %}"
    )
    _, learnt = _learnt(tokenizer, _row(messages=CONVERSATION))
    assert learnt == " \nDrei Äpfel 🍏.<|endoftext|>Yes.\n<|endoftext|>"


def test_without_completion_only_prompts_are_learnt_too(tokenizer: Any) -> None:
    row = _row(prompt="Ada has ", completion="3 apples.")
    _, mask = RowEncoder(tokenizer, completion_only=False).encode(row)
    assert mask == [False] + [True] * (len(mask) - 1)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"question": "?"},
            "field text: is missing: a row needs messages, or prompt and completion, or text",
        ),
        ({"completion": "b"}, "field prompt: is missing"),
        ({"prompt": "a", "completion": 3}, "field completion: is the number 3; it must be a string"),
        ({"text": ""}, "field text: is empty"),
        ({"messages": []}, "field messages: is empty; it must be an array of at least one message"),
        ({"messages": [{"role": "user"}]}, "field messages[0].content: is missing; it must be a string"),
        ({"messages": CONVERSATION[:1]}, 'no turn with role "assistant"'),
    ],
)
def test_bad_rows_are_named(tokenizer: Any, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StillhouseError) as error:
        RowEncoder(tokenizer, completion_only=True).encode(_row(**values))
    assert error.value.reason is Reason.DATASET_INVALID
    assert error.value.message.startswith("rows.jsonl, row 3, field ")
    assert sentence in error.value.message


def _write(path: Path, count: int) -> Path:
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"prompt": f"{number} and ", "completion": "one " * (number + 1)}) + "\n")
    return path


def _load(path: Path, tokenizer: Any, **settings: Any) -> Corpus:
    data = DataConfig(train=(DatasetConfig(path=str(path)),), **settings)
    return load_corpus(data, EvaluationConfig(), tokenizer, path.parent)


def test_the_split_depends_on_the_seed_alone(tokenizer: Any, tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", 50)
    first, again = _load(path, tokenizer, eval_fraction=0.2), _load(path, tokenizer, eval_fraction=0.2)
    other = _load(path, tokenizer, eval_fraction=0.2, seed=1)
    places = {example.place for example in first.eval}
    assert places == {example.place for example in again.eval}
    assert places != {example.place for example in other.eval}
    assert len(places) == 10
    assert not places & {example.place for example in first.train}


@pytest.mark.parametrize(("overflow", "kept"), [("truncate", 20), ("drop", 8)])
def test_long_rows_are_cut_or_left_out(tokenizer: Any, tmp_path: Path, overflow: str, kept: int) -> None:
    path = _write(tmp_path / "rows.jsonl", 20)
    whole = _load(path, tokenizer, eval_fraction=0.0)
    limit = sorted(len(example.token_ids) for example in whole.train)[7]
    corpus = _load(path, tokenizer, eval_fraction=0.0, overflow=overflow, max_sequence_tokens=limit)
    assert len(corpus.train) == kept
    assert max(len(example.token_ids) for example in corpus.train) == limit


def test_parquet_and_saved_datasets_give_the_same_rows(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    path = _write(tmp_path / "rows.jsonl", 5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    expected = [example.token_ids.tolist() for example in _load(path, tokenizer, eval_fraction=0.0).train]
    for name in ("saved", "rows.parquet"):
        corpus = _load(tmp_path / name, tokenizer, eval_fraction=0.0)
        assert [example.token_ids.tolist() for example in corpus.train] == expected


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"text": "a b c"}\n{"text": \n', "row 2, field (the line): is not JSON"),
        ('["text"]\n', 'row 1, field (the line): is the string "text"'),
        ("", "data.train has no rows"),
    ],
)
def test_files_that_are_no_json_lines_are_refused(
    tokenizer: Any, tmp_path: Path, content: str, sentence: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(StillhouseError) as error:
        _load(path, tokenizer)
    assert sentence in error.value.message


@pytest.mark.parametrize(
    ("row", "options", "causes"),
    [
        (
            {"messages": [*CONVERSATION[:1], {**CONVERSATION[1], "weight": 0}]},
            {},
            ["3 have weight 0 on every turn"],
        ),
        (
            {"text": "a b c d e"},
            {"max_sequence_tokens": 2, "overflow": "drop"},
            ["3 have more than 2 tokens"],
        ),
        (
            {"prompt": "a b c d e", "completion": " f"},
            {"max_sequence_tokens": 2},
            ["3 have no target within 2 tokens"],
        ),
        ({"prompt": "a", "completion": "", "finish_reason": "length"}, {}, ["3 have no text to learn"]),
    ],
)
def test_a_run_without_targets_names_the_cause(
    models: Models, tmp_path: Path, row: dict[str, Any], options: dict[str, Any], causes: list[str]
) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 3)
    with pytest.raises(StillhouseError, match="nothing to train on: of its 3 rows") as error:
        _load(path, AutoTokenizer.from_pretrained(models.student), **options)
    assert all(cause in error.value.message for cause in causes)


def test_held_out_files_without_a_row_are_refused(models: Models, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train, empty = tmp_path / "rows.jsonl", tmp_path / "empty.jsonl"
    train.write_text('{"text": "a house"}\n')
    empty.write_text("")
    held_out = (DatasetConfig(path=str(empty)),)
    with pytest.raises(StillhouseError, match=r"data\.eval has no rows") as error:
        _load(train, AutoTokenizer.from_pretrained(models.student), eval=held_out)
    assert error.value.reason is Reason.DATASET_INVALID


def test_text_that_is_no_unicode_names_its_row(tokenizer: Any, tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = pa.array([b"fine", b"\xff\xfe"])
    table = pa.table({"text": pa.Array.from_buffers(pa.utf8(), 2, raw.buffers())})
    pq.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "saved"):
        with pytest.raises(
            StillhouseError, match=rf"{name}, row 2, field \(the row\): has text that is not UTF-8"
        ):
            _load(tmp_path / name, tokenizer)
    half = tmp_path / "half.jsonl"
    half.write_text('{"text": "a", "by": "\\ud800"}\n')
    with pytest.raises(StillhouseError, match=r"row 1, field by: has .ud800 without its other half"):
        _load(half, tokenizer, teacher_field="by")


def test_the_log_says_what_is_not_learnt(models: Models, tmp_path: Path) -> None:
    from structlog.testing import capture_logs
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.student)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}", "{% if loop.last %}<think></think>{% endif %}{{ message['content'] }}"
    )
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"messages": CONVERSATION}) + "\n") * 3)
    with capture_logs() as lines:
        _load(path, tokenizer, eval_fraction=0.0)
    told = [line for line in lines if "are not learnt: the chat template writes them" in line["event"]]
    assert [line["number"] for line in told] == [3]


def test_names_of_the_service_lie_in_its_data_directory(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    _write(tmp_path / "datasets" / "abc", 3)
    data = DataConfig(train=(DatasetConfig(path="datasets/abc", limit=2),), eval_fraction=0.0)
    assert len(load_corpus(data, EvaluationConfig(), tokenizer, tmp_path).train) == 2


def test_every_epoch_takes_every_row_once_in_an_order_of_its_own() -> None:
    schedule = Schedule.from_config(
        10, OptimizerConfig(micro_batch_size=2, grad_accum_steps=2, epochs=2.0), seed=3
    )
    assert schedule.total_steps == 5
    taken = [row for step in range(5) for row in schedule.rows(step)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]


def test_the_last_step_of_whole_epochs_may_be_short() -> None:
    schedule = Schedule.from_config(10, OptimizerConfig(micro_batch_size=4, epochs=1.0), seed=0)
    assert [len(schedule.rows(step)) for step in range(schedule.total_steps)] == [4, 4, 2]


def test_max_steps_overrides_epochs() -> None:
    schedule = Schedule.from_config(3, OptimizerConfig(micro_batch_size=4, max_steps=7), seed=0)
    assert schedule.total_steps == 7
    assert all(len(schedule.rows(step)) == 4 for step in range(7))


def _rows_as_before(schedule: Schedule, step: int) -> list[int]:
    """Rows of a step, from permutations in lists."""

    def order(size: int, keys: list[int]) -> list[int]:
        permuted: list[int] = np.random.Generator(np.random.PCG64(keys)).permutation(size).tolist()
        return permuted

    rows = []
    begin = step * schedule.rows_per_step
    for position in range(begin, min(begin + schedule.rows_per_step, schedule.num_taken)):
        epoch, index = divmod(position, schedule.num_rows)
        if not schedule.weights:
            rows.append(order(schedule.num_rows, [schedule.seed, 2, epoch])[index])
            continue
        counts = schedule._counts()
        generator = np.random.Generator(np.random.PCG64([schedule.seed, 5, epoch]))
        turns = generator.permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
        dataset = turns[index]
        nth = turns[:index].count(dataset)
        size = schedule.dataset_sizes[dataset]
        passes, at = divmod(epoch * counts[dataset] + nth, size)
        first = sum(schedule.dataset_sizes[:dataset])
        rows.append(first + order(size, [schedule.seed, 2, passes, dataset])[at])
    return rows


@pytest.mark.parametrize(("sizes", "weights"), [((), ()), ((5, 30, 9), (0.5, 0.2, 0.3))])
def test_the_order_is_that_of_earlier_versions(sizes: tuple[int, ...], weights: tuple[float, ...]) -> None:
    schedule = Schedule.from_config(44, OptimizerConfig(batch_size=7, epochs=3.5), 9, sizes, weights)
    for step in range(schedule.total_steps):
        rows = schedule.rows(step)
        assert rows == _rows_as_before(schedule, step)
        assert all(type(row) is int for row in rows)
