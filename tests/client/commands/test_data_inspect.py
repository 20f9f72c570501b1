"""`stillhouse data inspect`: what a file holds, without a service and with one that encodes its rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from stillhouse.client.cli import cli
from stillhouse.client.inspection.lengths import histogram, percentiles
from stillhouse.protos.rows.reading.source import RowSource
from stillhouse.protos.rows.scan import MAX_SAMPLE_BYTES, scan
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_trainer

TRAINERS_OWN = "runs/made/final"
"""A model that lies in the trainer's data directory alone, without its weights."""
ASK = {"role": "user", "content": "How many?"}
ROWS = [{"messages": [ASK, {"role": "assistant", "content": "apple " * count}]} for count in (1, 2, 3, 60)]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["data", "inspect", *arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def trainer(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("trainer")
    shape = folder / "data" / TRAINERS_OWN
    shape.mkdir(parents=True)
    shutil.copy(models.student / "config.json", shape)
    with (
        no_process_left() as mark,
        start_trainer(
            folder / "data",
            directory=folder,
            options=["--allow-root", str(models.student)],
            environment=mark,
        ) as program,
    ):
        yield program


def test_without_a_tokenizer_format_fields_and_rows_are_told(file: Path) -> None:
    result = invoke(str(file))
    assert result.exit_code == 0, result.output
    assert f"{file}: JSONL, rows of messages\n4 rows\n" in result.stdout
    assert "messages  100 %  list" in result.stdout
    assert '"content": "How many?"' in result.stdout
    assert invoke(str(file), "--row", "4", "--json").stdout.count("apple") == 60


def test_refused_rows_are_told_with_line_and_remedy_and_set_the_exit_code(file: Path) -> None:
    with file.open("a") as rows:
        rows.write('{"text": "a"}\n{"messages": []}\n{\n')
    result = invoke(str(file))
    assert result.exit_code == 1
    assert "4 rows, 3 more refused" in result.stdout
    assert f"{file}, row 5, field text: makes it a row of text amid rows of messages." in result.stdout
    assert (
        f"{file}, row 6, field messages: is empty; it must be an array of at least one message."
        in result.stdout
    )
    assert f"{file}, row 7, field (the line): is not JSON" in result.stdout
    assert "row 5, field text: makes it" in invoke(str(file), "--row", "5").output
    document = json.loads(invoke(str(file), "--json").stdout)
    assert (document["rows"], document["refused"], len(document["refusals"])) == (4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--row", "9"], 2, "has no row 9 that is read"),
        (["--column", "prompt"], 2, "--column expects FIELD=NAME"),
        (["--tokenizer", "a", "--run", "b"], 2, "exclude each other"),
        (["--format", "alpaca"], 2, "row 1, field instruction: is missing in a row of alpaca"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(
    arguments: list[str], code: int, sentence: str, file: Path
) -> None:
    result = invoke(str(file), *arguments, *(["--row", "1"] if "--format" in arguments else []))
    assert (result.exit_code, sentence in result.output) == (code, True), result.output
    assert invoke(str(file.with_name("none.jsonl"))).exit_code == 4


def test_the_sample_is_bounded_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("w") as rows:
        for number in range(60):
            rows.write(json.dumps({"text": f"{number} " + "x" * 200_000}) + "\n")
    found = scan(RowSource(location=str(path)), sample_rows=1000)
    assert MAX_SAMPLE_BYTES / 2 < sum(len(text) for _, text in found.sample) <= MAX_SAMPLE_BYTES
    numbers = [number for number, _ in found.sample]
    assert numbers == sorted(set(numbers))
    assert {number // 20 for number in numbers} == {0, 1, 2}, "of all parts of the file"


@pytest.mark.model
def test_with_a_tokenizer_lengths_and_what_is_learnt_are_shown(
    file: Path, trainer: Program, models: Models
) -> None:
    run = file.with_name("run.yaml")
    run.write_text(
        f"student: {{model: {models.student}}}\ndata: {{train: [{{path: rows.jsonl}}], max_sequence_tokens: 40}}\n"
    )
    common = ["--trainer", trainer.target]
    result = invoke(str(file), "--run", str(run), "--row", "2", *common)
    assert result.exit_code == 0, result.output
    assert "lengths in tokens, of all 4 rows" in result.stdout
    assert "longer than data.max_sequence_tokens, 40: 1 of 4 (rows 4)" in result.stdout
    assert (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n⟦apple apple <|im_end|>⟧"
        in result.stdout
    )
    coloured = invoke(str(file), "--run", str(run), "--row", "2", "--color", "always", *common).stdout
    assert "\x1b[32m\x1b[1mapple apple <|im_end|>\x1b[0m" in coloured
    assert "⟦" not in coloured

    tokens = json.loads(invoke(str(file), "--tokenizer", str(models.student), "--json", *common).stdout)
    assert tokens["tokens"]["longer"] == []
    assert (tokens["tokens"]["sampled_rows"], tokens["tokens"]["percentiles"]["100"]) == (
        4,
        max(each["high"] for each in tokens["tokens"]["histogram"])
        and tokens["tokens"]["percentiles"]["100"],
    )
    learnt = "".join(
        text
        for text, is_target in zip(tokens["row"]["tokens"], tokens["row"]["targets"], strict=True)
        if is_target
    )
    assert learnt == "apple <|im_end|>"


@pytest.mark.model
def test_the_service_encodes_with_models_that_it_may_read(file: Path, trainer: Program) -> None:
    for model in ("/etc", str(file.parent), "../outside"):
        result = invoke(str(file), "--tokenizer", model, "--trainer", trainer.target)
        assert (result.exit_code, "student.model" in result.output) == (2, True), result.output


def test_a_sample_is_uniform_bounded_and_the_same_each_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(1, 4001)))
    source = RowSource(location=str(path))
    found = scan(source, sample_rows=400)
    numbers = [number for number, _ in found.sample]
    assert (found.num_rows, len(numbers), numbers == sorted(set(numbers))) == (4000, 400, True)
    assert abs(sum(numbers) / 400 - 2000) < 200
    assert [number for number, _ in scan(source, sample_rows=400).sample] == numbers
    part = scan(source, sample_rows=400, limit=10)
    assert (part.num_rows, part.is_complete) == (10, False)


@pytest.mark.parametrize("lengths", [[7], [0, 1], [3, 3, 3], [1, 94, 2048], list(range(0, 100_000, 7))])
def test_bins_hold_every_length_once(lengths: list[int]) -> None:
    bins = histogram(lengths)
    assert len(bins) <= 12
    for each in bins:
        assert each.rows == sum(each.low <= length < each.high for length in lengths)
    assert sum(each.rows for each in bins) == len(lengths)
    found: dict[int, Any] = percentiles(lengths)
    assert (found[0], found[100]) == (min(lengths), max(lengths))
    assert set(found.values()) <= set(lengths)


def encoding_processes(trainer: Program) -> list[int]:
    """Ids of the processes of a trainer that encode rows for clients."""
    return [
        each.pid
        for each in psutil.Process(trainer.process.pid).children(recursive=True)
        if "stillhouse.student_trainer.train.inspect_rows" in each.cmdline()
    ]


@pytest.mark.model
def test_what_names_its_columns_is_pushed_as_it_is(
    tmp_path: Path, trainer: Program, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("question,answer\nq,a\n")
    push = ["data", "push", str(table), "--trainer", trainer.target]
    refused = CliRunner().invoke(cli, push)
    assert (refused.exit_code, "name them by columns" in refused.output) == (2, True), refused.output
    taken = CliRunner().invoke(cli, [*push, "--column", "prompt=question", "--column", "completion=answer"])
    assert taken.exit_code == 0, taken.output
    monkeypatch.setattr("stillhouse.client.trainer.token_count.REQUEST_ROWS", 3)
    table.write_text("question,answer\n" + "q,a b c\n" * 6)
    count = [
        *(*push, "--column", "prompt=question", "--column", "completion=answer"),
        *("--name", "counted", "--tokenizer", str(models.student), "--json"),
    ]
    counted = CliRunner().invoke(cli, count)
    [told] = json.loads(counted.stdout)["datasets"]
    shown = CliRunner().invoke(cli, ["data", "show", "counted", "--json", *push[3:]])
    assert int(json.loads(shown.stdout)["num_tokens"]) == told["num_tokens"] > 6
    assert told["num_tokens"] % 6 == 0, "the same for each of two requests' rows"
    kept = encoding_processes(trainer)
    assert len(kept) == 1, "one process for both requests"
    assert CliRunner().invoke(cli, count).exit_code == 0
    assert encoding_processes(trainer) == kept, "and for the next file"
    for side in ("source", "target"):
        (tmp_path / f"pair.{side}").write_text("a\nb\n")
    document = (
        CliRunner().invoke(cli, ["data", "push", str(tmp_path / "pair.target"), "--json", *push[3:]]).stdout
    )
    assert json.loads(document)["datasets"][0]["num_rows"] == 2


@pytest.mark.model
def test_a_dataset_of_the_trainer_is_read_there(file: Path, trainer: Program, models: Models) -> None:
    to = ["--trainer", trainer.target]
    pushed = CliRunner().invoke(cli, ["data", "push", str(file), "--name", "held", *to])
    assert pushed.exit_code == 0, pushed.output
    options = ["--tokenizer", str(models.student), "--row", "2", "--json", *to]
    there, here = (json.loads(invoke(each, *options).stdout) for each in ("datasets/held", str(file)))
    assert there.pop("source") == "datasets/held"
    del here["source"]
    kinds = [[field.pop("types") for field in each["fields"].values()] for each in (there, here)]
    assert [list(each[0]) for each in kinds] == [["list"], ["list"]]
    assert there == here
    assert "datasets/none" in invoke("datasets/none", *to).stderr


@pytest.mark.model
def test_a_students_memory_is_estimated_from_what_the_trainer_tells(
    tmp_path: Path, trainer: Program, models: Models
) -> None:
    run = tmp_path / "run.yaml"
    found = []
    for model in (models.student, TRAINERS_OWN):
        run.write_text(f"student: {{model: {model}}}\n")
        result = CliRunner().invoke(cli, ["estimate", str(run), "--json", "--trainer", trainer.target])
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout))
    assert found[0] == found[1]
