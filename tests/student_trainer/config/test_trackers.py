"""Trackers of a run: each kind once, and the fields that its kind has."""

from __future__ import annotations

import pytest

from stillhouse.protos.errors import StillhouseError
from stillhouse.student_trainer.config.proto import from_proto
from tests.student_trainer.config.specs import changed


@pytest.mark.parametrize(
    ("trackers", "fields"),
    [
        ([{"kind": "wandb"}, {"kind": "mlflow"}, {"kind": "wandb"}], ["trackers[2].kind"]),
        ([{"kind": "wandbb"}], ["trackers[0].kind"]),
        ([{"project": "p"}], ["trackers[0].kind"]),
        ([{"kind": "mlflow", "entity": "team"}], ["trackers[0].entity"]),
        (
            [{"kind": "tensorboard", "uri": "http://a", "credential": "b"}],
            ["trackers[0].uri", "trackers[0].credential"],
        ),
    ],
)
def test_a_wrong_tracker_is_refused_by_its_field(trackers: list[dict[str, str]], fields: list[str]) -> None:
    with pytest.raises(StillhouseError) as refused:
        from_proto(changed("trackers", trackers))
    assert [each.field for each in refused.value.violations] == fields


def test_a_tracker_is_online_with_a_server_alone() -> None:
    listed = [
        {"kind": "wandb"},
        {"kind": "mlflow", "uri": "https://a"},
        {"kind": "swanlab", "credential": "b"},
    ]
    config = from_proto(changed("trackers", listed))
    assert [each.is_online for each in config.trackers] == [False, True, True]
    assert {each.project for each in config.trackers} == {"stillhouse"}
