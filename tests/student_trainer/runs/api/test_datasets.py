"""Datasets of a real run service: ids, versions, pages, deletion, and to whom they belong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason
from stillhouse.protos.rpc import tokens as auth_tokens
from stillhouse.protos.rpc.tokens import Scope
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceStub
from stillhouse.student_trainer.runs.api.dataset_uploads import begin_change, remove_leftovers
from tests.student_trainer.runs.api.caller import refused, wait_ended
from tests.student_trainer.runs.api.conftest import Service
from tests.student_trainer.runs.api.test_access import stub_of
from tests.support.programs import Program


def upload(stub: RunServiceStub, content: bytes, dataset_id: str = "", **values: int) -> pb.Dataset:
    first = pb.UploadDatasetRequest(file_name="rows.jsonl", dataset_id=dataset_id, data=content, **values)
    return stub.UploadDataset(iter([first])).dataset


def rows(text: str) -> bytes:
    return b'{"text": "%s"}\n' % text.encode() * 8


def test_a_run_pins_the_newest_version_when_it_is_created(service: Service) -> None:
    first = upload(service.stub, rows("one"), "pinned", num_rows=8, num_tokens=16)
    assert (first.name, first.num_rows, first.num_tokens) == ("datasets/pinned@1", 8, 16)
    run = service.create_waiting(spec=service.spec(path="datasets/pinned"))
    second = upload(service.stub, rows("two"), "pinned")
    assert second.name == "datasets/pinned@2"
    path = service.data_dir / "datasets" / f"{hashlib.sha256(rows('one')).hexdigest()}.jsonl"
    found = service.stub.GetRun(pb.GetRunRequest(name=run.name))
    assert (found.spec.data.train[0].path, list(found.datasets)) == ("datasets/pinned", ["datasets/pinned@1"])
    assert found.effective_spec.data.train[0].path == str(path)
    newer = service.create(service.spec(path="datasets/pinned"), validate_only=True)
    assert list(newer.datasets) == ["datasets/pinned@2"]
    with refused(Reason.INVALID_SPEC) as caught:
        service.create(service.spec(path="datasets/pinned@9"), validate_only=True)
    assert "data push" in caught[0].violations[0].description


def test_a_dataset_of_a_live_run_is_not_deleted(service: Service) -> None:
    dataset = upload(service.stub, rows("used"), "used")
    run = service.create_waiting(spec=service.spec(path=dataset.name))
    with refused(Reason.DATASET_IN_USE) as caught:
        service.stub.DeleteDataset(pb.DeleteDatasetRequest(name=dataset.name))
    assert run.name in caught[0].message
    assert list(service.stub.GetDataset(pb.GetDatasetRequest(name="datasets/used")).live_runs) == [run.name]
    service.stub.StopRun(pb.StopRunRequest(name=run.name))
    wait_ended(service.stub, run.name)
    with refused(Reason.DATASET_IN_USE):  # it can be resumed
        service.stub.DeleteDataset(pb.DeleteDatasetRequest(name=dataset.name))
    service.stub.DeleteRun(pb.DeleteRunRequest(name=run.name))
    path = service.data_dir / "datasets" / f"{dataset.sha256}.jsonl"
    assert path.exists()
    service.stub.DeleteDataset(pb.DeleteDatasetRequest(name=dataset.name))
    assert not path.exists()
    assert not list(path.parent.glob(".*"))
    with refused(Reason.DATASET_NOT_FOUND):
        service.stub.GetDataset(pb.GetDatasetRequest(name=dataset.name))


def test_the_same_bytes_keep_the_suffix_of_their_first_upload(service: Service) -> None:
    content = b'{"text": "suffix"}\n'
    first = service.upload("rows.jsonl", content)
    assert service.upload("rows.json", content).name == first.name, "read in the same way"
    with refused(Reason.DATASET_INVALID) as caught:
        service.upload("rows.csv", content)
    assert "read as JSONL, where this name means CSV" in caught[0].message
    digest = first.name.removeprefix("datasets/")
    assert [each.name for each in service.data_dir.joinpath("datasets").glob(f"*{digest}*")] == [
        f"{digest}.jsonl"
    ]


def test_a_killed_service_leaves_no_file_without_its_row(tmp_path: Path) -> None:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("with row", "without", "other")}
    for digest in digests.values():
        (tmp_path / f"{digest}.jsonl").touch()
    for name in ("with row", "without"):
        begin_change(tmp_path, digests[name])
    (tmp_path / ".upload-0").touch()
    remove_leftovers(tmp_path, has_row=lambda digest: digest == digests["with row"])
    left = sorted(each.name for each in tmp_path.iterdir())
    assert left == sorted(f"{digests[name]}.jsonl" for name in ("with row", "other"))


@pytest.mark.parametrize(
    "name", ["", "sums@1", "datasets/", "datasets/../x", "datasets/a@0", "datasets/sums"]
)
def test_a_name_without_its_version_or_of_another_form_deletes_nothing(service: Service, name: str) -> None:
    with refused(Reason.INVALID_REQUEST):
        service.stub.DeleteDataset(pb.DeleteDatasetRequest(name=name))


@pytest.mark.parametrize("dataset_id", ["../x", "a/b", "a@1", "x" * 65, "0" * 64, "-a", "a b", "é"])
def test_an_id_that_no_name_can_hold_is_refused_before_anything_is_stored(
    service: Service, dataset_id: str
) -> None:
    before = sorted(service.data_dir.joinpath("datasets").iterdir())
    with refused(Reason.INVALID_REQUEST):
        upload(service.stub, rows(dataset_id.encode().hex()), dataset_id)
    with refused(Reason.INVALID_REQUEST):
        upload(service.stub, rows("negative"), "negative", num_rows=-1)
    assert sorted(service.data_dir.joinpath("datasets").iterdir()) == before


def test_pages_show_each_dataset_once_and_belong_to_their_request(service: Service) -> None:
    for number in range(5):
        upload(service.stub, b'{"text": "%d"}\n' % number, "many")
    names: list[str] = []
    request = pb.ListDatasetsRequest(page_size=2, dataset_id="many")
    while True:
        page = service.stub.ListDatasets(request)
        names += [each.name for each in page.datasets]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert names == [f"datasets/many@{version}" for version in range(5, 0, -1)]
    with refused(Reason.INVALID_REQUEST):
        service.stub.ListDatasets(pb.ListDatasetsRequest(page_token="3-many"))


def test_a_token_changes_only_datasets_of_its_own(
    trainer_service: Callable[..., Program], tmp_path: Path
) -> None:
    tokens = tmp_path / "trainer-data" / "tokens.json"
    tokens.parent.mkdir()
    ada, ben, op = (
        auth_tokens.create(tokens, name=name, scopes=[scope], lifetime_s=None)[0]
        for name, scope in (("ada", Scope.SUBMIT), ("ben", Scope.SUBMIT), ("op", Scope.ADMIN))
    )
    target = trainer_service().target
    with stub_of(target, ada) as ada_stub, stub_of(target, ben) as ben_stub, stub_of(target, op) as op_stub:
        dataset = upload(ada_stub, rows("one"), "sums")
        assert dataset.owner == "ada"
        assert ben_stub.GetDataset(pb.GetDatasetRequest(name="datasets/sums")).owner == "ada", "all may read"
        with refused(Reason.PERMISSION_DENIED) as caught:
            upload(ben_stub, rows("two"), "sums")
        assert "choose another id" in caught[0].message
        with refused(Reason.PERMISSION_DENIED):
            ben_stub.DeleteDataset(pb.DeleteDatasetRequest(name=dataset.name))
        assert upload(op_stub, rows("two"), "sums").name == "datasets/sums@2"
        ada_stub.DeleteDataset(pb.DeleteDatasetRequest(name=dataset.name))
        op_stub.DeleteDataset(pb.DeleteDatasetRequest(name="datasets/sums@2"))
    assert list((tmp_path / "trainer-data" / "datasets").iterdir()) == []
