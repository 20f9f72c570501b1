"""Contract of the datasets of every store; a test module provides the fixture `store` and inherits these tests."""

from __future__ import annotations

import time

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import Dataset
from stillhouse.student_trainer.runs.store.datasets import Reference, StoredDataset, Upload
from stillhouse.student_trainer.runs.store.store import Store
from tests.student_trainer.config.specs import SMALLEST, changed, spec_of

SPEC = spec_of(SMALLEST)
A, B = "a" * 64, "b" * 64


def add(store: Store, sha256: str, dataset_id: str = "", **values: object) -> Dataset:
    file = {"suffix": ".jsonl", "file_name": "rows.jsonl", "size_bytes": 3} | values
    return store.datasets.add(Upload(sha256=sha256, dataset_id=dataset_id, **file), owner="ada")  # type: ignore[arg-type]


def reference(name: str) -> Reference:
    parsed = Reference.parse(name)
    assert parsed is not None
    return parsed


def listed(store: Store, dataset_id: str = "") -> list[str]:
    return [each.name for each in store.datasets.page(dataset_id, before=None, limit=100)[0]]


class DatasetContract:
    def test_a_dataset_keeps_the_suffix_of_its_first_upload(self, store: Store) -> None:
        assert store.datasets.find(f"datasets/{A}") is None
        assert add(store, A, suffix=".json").name == f"datasets/{A}"
        add(store, A, suffix=".jsonl")
        assert store.datasets.find(f"datasets/{A}") == StoredDataset(
            name=f"datasets/{A}", sha256=A, suffix=".json"
        )
        assert listed(store) == [f"datasets/{A}"]

    def test_versions_count_up_and_the_same_content_is_the_same_version(self, store: Store) -> None:
        names = [add(store, each, "sums", num_rows=2).name for each in (A, A, B, A)]
        assert add(store, A, "sums", num_tokens=7).num_tokens == 7, "counted later"
        assert names == ["datasets/sums@1", "datasets/sums@1", "datasets/sums@2", "datasets/sums@3"]
        found = store.datasets.get(reference("datasets/sums"))
        assert (found.name, found.sha256, found.num_rows, found.owner) == ("datasets/sums@3", A, 2, "ada")
        assert abs(found.create_time.ToSeconds() - time.time()) < 60
        newest, second = store.datasets.find("datasets/sums"), store.datasets.find("datasets/sums@2")
        assert newest
        assert second
        assert (newest.name, newest.sha256) == ("datasets/sums@3", A)
        assert second.file == f"datasets/{B}.jsonl"
        assert store.datasets.find("datasets/sums@4") is None
        assert store.datasets.owners("sums") == {"ada"}

    def test_pages_go_from_the_newest_to_the_oldest(self, store: Store) -> None:
        for number in range(7):
            add(store, f"{number:064x}", "even" if number % 2 == 0 else "")
        seen: list[str] = []
        before: int | None = None
        while True:
            page, before = store.datasets.page("", before=before, limit=3)
            seen += [each.name for each in page]
            if before is None:
                break
        assert seen == listed(store)
        assert len(seen) == len(set(seen)) == 7
        assert listed(store, "even") == [f"datasets/even@{version}" for version in (4, 3, 2, 1)]

    def test_a_file_goes_with_the_last_dataset_of_its_content(self, store: Store) -> None:
        add(store, A, "sums"), add(store, A, "others"), add(store, A)
        for name in ("datasets/sums@1", f"datasets/{A}"):
            store.datasets.delete(reference(name))
            assert store.datasets.has_file(A)
        assert store.datasets.find(f"datasets/{A}") is not None, "by its content as long as it is there"
        store.datasets.delete(reference("datasets/others@1"))
        assert not store.datasets.has_file(A)
        assert store.datasets.find(f"datasets/{A}") is None
        with pytest.raises(StillhouseError, match="no dataset datasets/sums@1") as caught:
            store.datasets.delete(reference("datasets/sums@1"))
        assert caught.value.reason is Reason.DATASET_NOT_FOUND

    def test_a_deleted_version_is_never_another_one(self, store: Store) -> None:
        add(store, A, "sums"), add(store, B, "sums")
        store.datasets.delete(reference("datasets/sums@2"))
        assert listed(store) == ["datasets/sums@1"]
        assert add(store, B, "sums").name == "datasets/sums@3"

    def test_a_dataset_of_a_live_run_stays_and_the_run_names_it(self, store: Store) -> None:
        add(store, A, "sums")
        stored = store.datasets.find("datasets/sums")
        assert stored is not None
        effective = changed("data.train", [{"path": f"/data/{stored.file}"}])
        made = {"request_id": "", "version": "1", "datasets": [stored]}
        run, _ = store.create("aaaaaaaaaaaa", SPEC, effective, **made)  # type: ignore[arg-type]
        assert list(run.datasets) == ["datasets/sums@1"]
        assert list(store.datasets.get(reference("datasets/sums@1")).live_runs) == [run.name]
        with pytest.raises(StillhouseError, match="used by runs/aaaaaaaaaaaa") as caught:
            store.datasets.delete(reference("datasets/sums@1"))
        assert caught.value.reason is Reason.DATASET_IN_USE
        store.stop("aaaaaaaaaaaa")
        with pytest.raises(StillhouseError, match="used by runs/aaaaaaaaaaaa"):  # it can be resumed
            store.datasets.delete(reference("datasets/sums@1"))
        store.delete("aaaaaaaaaaaa")
        store.datasets.delete(reference("datasets/sums@1"))
        with pytest.raises(StillhouseError, match="no dataset datasets/sums@1"):
            store.create("bbbbbbbbbbbb", SPEC, effective, **made)  # type: ignore[arg-type]
        assert store.ids() == set()


@pytest.mark.parametrize(
    "name",
    [
        "sums@1",
        "datasets/",
        "datasets/a@0",
        "datasets/a@",
        "datasets/-a",
        "datasets/a/b",
        f"datasets/{A}@1",
        "datasets/a@1@2",
        "datasets/" + "x" * 65,
        "datasets/a\n",
    ],
)
def test_other_names_are_no_datasets(name: str) -> None:
    assert Reference.parse(name) is None
