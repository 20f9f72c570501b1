"""Lookup of a run by complete id, unique prefix, or `latest`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stillhouse.client.trainer.run_lookup import find_run, run_id
from stillhouse.protos.errors import Reason, StillhouseError

NAMES = ["runs/bbbbbbbbbbbb", "runs/abcabcabcabc", "runs/abdabdabdabd"]


def find(wanted: str, names: list[str] = NAMES) -> str:
    return run_id(find_run(wanted, lambda: iter(names)))


def test_prefix_latest_and_resource_name() -> None:
    assert find("latest") == "bbbbbbbbbbbb"
    assert find("abc") == "abcabcabcabc"
    assert find("runs/abd") == "abdabdabdabd"


def test_a_complete_id_is_not_looked_up() -> None:
    def never() -> Iterator[str]:
        raise AssertionError

    assert find_run("zzzzzzzzzzzz", never) == "runs/zzzzzzzzzzzz"


@pytest.mark.parametrize(
    ("wanted", "reason", "sentence"),
    [
        ("ab", Reason.INVALID_REQUEST, '"ab" matches 2 runs (abcabcabcabc, abdabdabdabd); give more characters.'),
        ("c", Reason.RUN_NOT_FOUND, 'no run\'s id begins with "c"; `stillhouse run list` shows the runs.'),
        ("../x", Reason.INVALID_REQUEST, '"../x" is not a run id: give one of 12 characters of a-z and 2-7, a prefix of one, or "latest"; `stillhouse run list` shows them.'),
        ("", Reason.INVALID_REQUEST, '"" is not a run id: give one of 12 characters of a-z and 2-7, a prefix of one, or "latest"; `stillhouse run list` shows them.'),
    ],
)  # fmt: skip
def test_an_invalid_run_id_gets_one_sentence(wanted: str, reason: Reason, sentence: str) -> None:
    with pytest.raises(StillhouseError) as caught:
        find(wanted)
    assert (caught.value.reason, str(caught.value)) == (reason, sentence)


def test_latest_without_runs_says_how_to_create_one() -> None:
    with pytest.raises(
        StillhouseError, match="there is no run yet; `stillhouse run create FILE` creates one"
    ):
        find("latest", [])
