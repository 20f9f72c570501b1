"""Attached results are small JSON objects under plain names; nothing else reaches the run's directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import AttachResultRequest
from stillhouse.student_trainer.runs.api.artifacts import Artifacts
from stillhouse.student_trainer.runs.api.attached_results import MAX_BYTES, MAX_RESULTS, attach


def request(file_name: str = "results.json", data: bytes = b'{"acc": 0.5}') -> AttachResultRequest:
    return AttachResultRequest(name="runs/abcdefgh2345", file_name=file_name, data=data)


def test_a_result_becomes_an_artifact_and_replaces_the_earlier_one(tmp_path: Path) -> None:
    attach(tmp_path, request(data=b'{"acc": 0.1}'))
    stored = attach(tmp_path, request())
    [listed] = Artifacts().listing(tmp_path)
    assert listed == stored
    assert (tmp_path / stored.path).read_bytes() == b'{"acc": 0.5}'


@pytest.mark.parametrize(
    ("file_name", "data", "sentence"),
    [
        ("../spec.json", b"{}", "not a plain name"),
        (".hidden.json", b"{}", "not a plain name"),
        ("a/b.json", b"{}", "not a plain name"),
        ("results.txt", b"{}", "not a plain name"),
        ("", b"{}", "not a plain name"),
        ("a.json", b"[1]", "not a JSON object"),
        ("a.json", b"\xff", "not a JSON object"),
        ("a.json", b"[" * 100_000, "not a JSON object"),
        ("a.json", b" " * (MAX_BYTES + 1), f"limit is {MAX_BYTES}"),
    ],
)
def test_anything_else_is_refused_and_leaves_nothing(
    tmp_path: Path, file_name: str, data: bytes, sentence: str
) -> None:
    with pytest.raises(StillhouseError, match=sentence) as raised:
        attach(tmp_path, request(file_name, data))
    assert raised.value.reason is Reason.INVALID_REQUEST
    assert not list(tmp_path.iterdir())


def test_a_run_has_a_bounded_number_of_results(tmp_path: Path) -> None:
    for number in range(MAX_RESULTS):
        attach(tmp_path, request(f"{number}.json"))
    with pytest.raises(StillhouseError) as raised:
        attach(tmp_path, request("more.json"))
    assert raised.value.reason is Reason.QUOTA
    attach(tmp_path, request("0.json"))


def test_a_run_without_files_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError) as raised:
        attach(tmp_path / "gone", request())
    assert raised.value.reason is Reason.RUN_NOT_FOUND
    assert not (tmp_path / "gone").exists()
