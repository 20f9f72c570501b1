"""A dataset as the page shows it: rows where they lie, with the tokens and the mask that training has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.student_trainer.train import inspect_dataset as module
from stillhouse.student_trainer.train.inspect_dataset import inspect_dataset
from stillhouse.student_trainer.train.inspect_rows import Inspector
from tests.conftest import Models


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [{"prompt": "Ada has ", "completion": f"{number} apples."} for number in range(1, 41)]
    path.write_text("".join(json.dumps(each) + "\n" for each in texts) + '{"prompt": "a"}\n')
    return path


def request_of(path: Path, models: Models, **fields: int) -> pb.InspectDatasetRequest:
    spec = pb.RunSpec()
    spec.student.model = str(models.student)
    fields = {"num_rows": 2, "max_rows": 1000, **fields}
    return pb.InspectDatasetRequest(dataset=pb.DatasetSpec(path=str(path)), spec=spec, **fields)


def test_rows_are_encoded_as_those_of_a_run(models: Models, rows: Path, tmp_path: Path) -> None:
    found = inspect_dataset(request_of(rows, models, first_row=5, sample_rows=10), tmp_path)
    assert (found.num_rows, found.num_refused, found.refusals[0].number) == (40, 1, 41)
    assert [each.number for each in found.rows] == [5, 6]
    shown = [each for each in found.encoding.rows if each.token_ids]
    assert [each.number for each in shown] == [5, 6]
    assert 10 <= len(found.encoding.rows) <= 12
    asked = [pb.InspectedRow(number=each.number, json=each.json, in_full=True) for each in found.rows]
    spec = request_of(rows, models).spec
    assert shown == list(Inspector(tmp_path).inspect(pb.InspectRowsRequest(spec=spec, rows=asked)).rows)
    assert b"".join(shown[0].token_bytes).decode().startswith("Ada has 5 apples.")
    assert 0 < sum(shown[0].targets) < len(shown[0].targets)


def test_without_a_sample_the_shown_rows_alone_are_encoded(
    models: Models, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SHOWN_TOKENS", 3)
    monkeypatch.setattr(module, "MAX_SHOWN_CHARS", 10)
    found = inspect_dataset(request_of(rows, models), tmp_path)
    assert [each.number for each in found.encoding.rows] == [1, 2]
    assert [len(each.token_ids) for each in found.encoding.rows] == [3, 3]
    assert found.encoding.rows[0].num_tokens > 3
    assert [each.json for each in found.rows] == ["", ""]


def test_a_dataset_that_is_not_there_is_named(models: Models, tmp_path: Path) -> None:
    with pytest.raises(StillhouseError) as caught:
        inspect_dataset(request_of(tmp_path / "none.jsonl", models), tmp_path)
    assert caught.value.reason == Reason.DATASET_NOT_FOUND
