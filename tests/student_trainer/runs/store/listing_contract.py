"""Contract of the lists of every store; a test module provides the fixture `store` and inherits these tests."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.runs.store import queries
from stillhouse.student_trainer.runs.store.run_filter import RunFilter
from stillhouse.student_trainer.runs.store.store import Store
from tests.student_trainer.config.specs import SMALLEST, spec_of
from tests.student_trainer.runs.store.store_contract import new_run


class ListingContract:
    def test_pages_hold_every_run_once_newest_first(self, store: Store) -> None:
        ids = [f"aaaaaaaaaaa{letter}" for letter in "abcdefg"]
        for run_id in ids:
            new_run(store, run_id)
        store.stop(ids[3])
        seen, before = [], None
        while True:
            page, before = store.page(RunFilter(), before=before, limit=3)
            seen += [run.name for run in page]
            if before is None:
                break
        assert seen == [f"runs/{run_id}" for run_id in reversed(ids)]
        stopped, following = store.page(RunFilter(states=[Run.STATE_STOPPED]), before=None, limit=1)
        assert [run.name for run in stopped] == [f"runs/{ids[3]}"]
        assert following is None

    def test_runs_are_searched_by_labels_and_text_page_by_page(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(queries, "SEARCHED_AT_ONCE", 2)
        monkeypatch.setattr(queries, "MOST_SEARCHED", 4)
        ids = [f"aaaaaaaaaaa{letter}" for letter in "abcdefg"]
        for number, run_id in enumerate(ids):
            spec = spec_of(
                {
                    **SMALLEST,
                    "display_name": f"Sweep {number}",
                    "labels": {"team": "ab"[number % 2], "sweep": "1"},
                }
            )
            store.create(run_id, spec, spec, request_id="", version="1")
        store.stop(ids[6])

        def found(limit: int = 3, **conditions: Any) -> list[list[str]]:
            pages, before = [], None
            while True:
                page, before = store.page(RunFilter(**conditions), before=before, limit=limit)
                pages.append([run.name.removeprefix("runs/") for run in page])
                if before is None:
                    return pages

        of_a = [ids[6], ids[4], ids[2], ids[0]]
        assert found(labels=["team=a"]) == [of_a[:2], of_a[2:]]  # four runs a page are looked through
        assert found(1, labels=["team=a", "sweep"]) == [[each] for each in of_a]
        assert found(labels=["team=a"], states=[Run.STATE_PENDING]) == [[ids[4], ids[2]], [ids[0]]]
        assert found(text="sweep 2") == [[], [ids[2]]]
        assert found(text=ids[5].upper()) == [[ids[5]], []]
        assert found(labels=["team=c"]) == found(labels=["tea"]) == [[], []]
