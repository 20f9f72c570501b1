"""A dataset as the page shows it: read where it lies, with the rows that are encoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.student_trainer.train import inspect_dataset as module
from stillhouse.student_trainer.train.inspect_dataset import inspect_dataset


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [{"prompt": "Ada has ", "completion": f"{number} apples."} for number in range(1, 41)]
    path.write_text("".join(json.dumps(each) + "\n" for each in texts) + '{"prompt": "a"}\n')
    return path


def request_of(path: Path, model: str = "student", **fields: int) -> pb.InspectDatasetRequest:
    request = pb.InspectDatasetRequest(dataset=pb.DatasetSpec(path=str(path)), num_rows=2, max_rows=1000)
    request.spec.student.model = model
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def test_shown_rows_are_encoded_in_full_and_a_sample_for_its_lengths(rows: Path) -> None:
    request = request_of(rows, first_row=5, sample_rows=10)
    found, encoded = inspect_dataset(request)
    assert (found.num_rows, found.num_refused, found.refusals[0].number) == (40, 1, 41)
    assert [each.number for each in found.rows] == [5, 6]
    assert encoded.spec == request.spec
    numbers = [each.number for each in encoded.rows]
    assert (numbers == sorted(set(numbers)), 10 <= len(numbers) <= 12) == (True, True)
    shown = [each for each in encoded.rows if each.in_full]
    assert [(each.number, each.json) for each in shown] == [(each.number, each.json) for each in found.rows]
    assert json.loads(shown[0].json)["completion"] == "5 apples."


def test_without_a_sample_or_a_student_less_is_encoded(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHOWN_CHARS", 10)
    found, encoded = inspect_dataset(request_of(rows))
    assert [each.json for each in found.rows] == ["", ""]
    assert [(each.number, each.in_full) for each in encoded.rows] == [(1, True), (2, True)]
    assert not inspect_dataset(request_of(rows, "", sample_rows=10))[1].rows


def test_settings_of_the_run_decide_on_refusals(rows: Path) -> None:
    rows.write_text('{"text": "a", "teacher": "b"}\n')
    request = request_of(rows)
    request.spec.data.extra_fields = "refuse"
    assert inspect_dataset(request)[0].refusals[0].field == "teacher"
    request.spec.data.teacher_field = "teacher"
    assert inspect_dataset(request)[0].num_rows == 1


def test_a_dataset_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError) as caught:
        inspect_dataset(request_of(tmp_path / "none.jsonl"))
    assert caught.value.reason == Reason.DATASET_NOT_FOUND
