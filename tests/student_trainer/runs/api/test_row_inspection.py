"""InspectRows of a real run service: within its roots and its limits, and nothing is stored."""

from __future__ import annotations

import pytest

from stillhouse.protos.errors import Reason
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.student_trainer.runs.api.row_inspection import MAX_ROWS
from tests.student_trainer.runs.api.caller import refused
from tests.student_trainer.runs.api.conftest import Service


def inspect(service: Service, model: str, *rows: str, **data: str) -> pb.InspectRowsResponse:
    spec = pb.RunSpec()
    spec.student.model = model
    for name, value in data.items():
        setattr(spec.data, name, value)
    asked = [pb.InspectedRow(number=at, json=row) for at, row in enumerate(rows, start=1)]
    return service.stub.InspectRows(pb.InspectRowsRequest(spec=spec, rows=asked))


@pytest.mark.parametrize(
    ("model", "data", "field"),
    [
        ("", {}, "student.model"),
        ("/etc", {}, "student.model"),
        ("nobody/nothing", {}, "student.model"),
        ("nobody/nothing", {"chat_template": "/etc/passwd"}, "data.chat_template"),
        ("nobody/nothing", {"tools": "tools.json"}, "data.tools"),
        ("nobody/nothing", {"tools": "[1]"}, "data.tools[0]"),
        ("nobody/nothing", {"chat_template_kwargs": "[]"}, "data.chat_template_kwargs"),
        ("nobody/nothing", {"overflow": "cut"}, "data.overflow"),
    ],
)
def test_settings_are_checked_as_those_of_a_run(
    service: Service, model: str, data: dict[str, str], field: str
) -> None:
    with refused(Reason.INVALID_SPEC) as caught:
        inspect(service, model, '{"text": "a"}', **data)
    assert field in {each.field for each in caught[0].violations}


def test_rows_are_bounded(service: Service) -> None:
    with refused(Reason.INVALID_REQUEST):
        inspect(service, "a", *["{}"] * (MAX_ROWS + 1))


def test_a_failure_of_the_process_is_the_clients_error(service: Service) -> None:
    model = service.spec().student.model
    with refused(Reason.MODEL_NOT_FOUND):
        inspect(service, model, '{"text": "a"}')


@pytest.mark.parametrize("path", ["", "/etc/passwd", "datasets/none@1", "outside/none.jsonl"])
def test_a_dataset_is_looked_for_as_that_of_a_run(service: Service, path: str) -> None:
    with refused(Reason.INVALID_SPEC) as caught:
        service.stub.InspectDataset(pb.InspectDatasetRequest(dataset=pb.DatasetSpec(path=path)))
    assert [each.field for each in caught[0].violations] == ["dataset.path"]


def test_an_uploaded_dataset_is_read_without_a_tokenizer(service: Service) -> None:
    name = service.upload("rows.csv", b"prompt,completion\na,b\nc,d\n").name
    found = service.stub.InspectDataset(pb.InspectDatasetRequest(dataset=pb.DatasetSpec(path=name)))
    assert (found.container, found.num_rows, found.complete) == ("CSV", 2, True)
    assert [each.name for each in found.fields] == ["prompt", "completion"]
    assert (len(found.rows), found.HasField("encoding")) == (1, False)
    for field in ("first_row", "num_rows", "sample_rows", "max_rows"):
        request = pb.InspectDatasetRequest(dataset=pb.DatasetSpec(path=name))
        setattr(request, field, -1)
        with refused(Reason.INVALID_REQUEST):
            service.stub.InspectDataset(request)


def test_a_students_configuration_is_told(service: Service) -> None:
    found = service.stub.InspectStudent(pb.InspectStudentRequest(model=service.spec().student.model))
    assert found.config_json == '{"model_type": "nothing"}'
    assert found.host_memory_bytes > 2**28
    for model in ("", "/etc", "nobody/nothing"):
        with refused(Reason.INVALID_SPEC) as caught:
            service.stub.InspectStudent(pb.InspectStudentRequest(model=model))
        assert [each.field for each in caught[0].violations] == ["model"]
