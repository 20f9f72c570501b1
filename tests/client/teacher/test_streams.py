"""Broken streams of the trainer: nothing is lost or repeated, and waiting has an end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stillhouse.client.api import RunHandle, Trainer
from stillhouse.client.cli import cli
from stillhouse.client.core import connection
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2
from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, Run, WatchRunResponse
from tests.client.teacher.odd_services import odd_service

NAME = "runs/abcabcabcabc"
GONE = StillhouseError(Reason.DRAINING, "The trainer is going down.", retry_after_s=0.0)


def change(sequence: int, state: Run.State.ValueType, step: int = 0) -> WatchRunResponse:
    progress = run_pb2.Progress(step=step, total_steps=9)
    return WatchRunResponse(sequence=sequence, run=Run(name=NAME, state=state, progress=progress))


def metrics(sequence: int, step: int, **values: float) -> WatchRunResponse:
    named = {key.replace("__", "/"): value for key, value in values.items()}
    return WatchRunResponse(sequence=sequence, metrics=MetricPoint(step=step, values=named))


def test_watching_resumes_after_the_last_sequence() -> None:
    asked: list[int] = []

    def watch(request: Any) -> Iterator[WatchRunResponse]:
        asked.append(request.after_sequence)
        if len(asked) == 1:
            yield change(1, Run.STATE_RUNNING)
            yield metrics(2, 1, train__loss=2.0)
            raise GONE
        yield metrics(2, 1, train__loss=2.0)
        yield change(3, Run.STATE_COMPLETED)

    lost: list[StillhouseError] = []
    with odd_service(WatchRun=watch) as target, Trainer(target) as trainer:
        events = list(RunHandle(trainer, NAME).watch(on_lost=lambda error, _: lost.append(error)))
    assert [event.sequence for event in events] == [1, 2, 3]
    assert asked == [0, 2]
    assert [error.reason for error in lost] == [Reason.DRAINING]


def test_a_stream_that_ends_before_its_run_is_opened_again() -> None:
    asked: list[int] = []

    def watch(request: Any) -> Iterator[WatchRunResponse]:
        asked.append(request.after_sequence)
        yield change(len(asked), Run.STATE_RUNNING if len(asked) < 3 else Run.STATE_STOPPED)

    with odd_service(WatchRun=watch) as target, Trainer(target) as trainer:
        assert RunHandle(trainer, NAME).wait().state == Run.STATE_STOPPED
    assert asked == [0, 1, 2]


def test_an_expired_cursor_starts_from_the_present_state() -> None:
    asked: list[int] = []

    def watch(request: Any) -> Iterator[WatchRunResponse]:
        asked.append(request.after_sequence)
        if request.after_sequence:
            raise StillhouseError(Reason.CURSOR_EXPIRED, "Sequence 5 is gone; the oldest is 90.")
        yield change(95, Run.STATE_COMPLETED)

    with odd_service(WatchRun=watch) as target, Trainer(target) as trainer:
        events = list(RunHandle(trainer, NAME).watch(after_sequence=5))
    assert (asked, [event.sequence for event in events]) == ([5, 0], [95])


def test_waiting_for_a_lost_trainer_has_an_end() -> None:
    def watch(_: Any) -> Iterator[WatchRunResponse]:
        yield change(1, Run.STATE_RUNNING)
        raise GONE

    with odd_service(WatchRun=watch) as target, Trainer(target) as trainer:
        events = RunHandle(trainer, NAME).watch(patience_s=-1.0)
        assert next(events).sequence == 1
        with pytest.raises(StillhouseError, match="going down"):
            next(events)


def test_a_long_silence_before_a_break_does_not_count_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queued run sends nothing for hours; its watch is opened again like any other."""
    monkeypatch.setattr(connection, "CONNECTED_S", 0.2)
    asked: list[int] = []

    def watch(request: Any) -> Iterator[WatchRunResponse]:
        asked.append(request.after_sequence)
        if not request.after_sequence:
            yield change(1, Run.STATE_PENDING)
        if len(asked) < 3:
            time.sleep(4)
            raise GONE
        yield change(2, Run.STATE_STOPPED)

    with odd_service(WatchRun=watch) as target, Trainer(target) as trainer:
        events = list(RunHandle(trainer, NAME).watch(patience_s=3.0))
    assert asked == [0, 1, 1]
    assert [event.sequence for event in events] == [1, 2]


def test_watch_shows_changes_steps_and_evaluations_as_lines() -> None:
    def watch(_: Any) -> Iterator[WatchRunResponse]:
        yield change(1, Run.STATE_RUNNING)
        yield metrics(2, 1, train__loss=2.0, train__tokens_per_second=1234.0)
        yield metrics(3, 2, train__loss=1.9)
        yield metrics(4, 9, eval__kl=0.25, eval__agreement=0.5)
        failed = change(5, Run.STATE_FAILED, step=9)
        failed.run.error.code = 9
        failed.run.error.message = "Out of \x1b[31mmemory. Halve optimizer.micro_batch_size."
        yield failed

    with odd_service(WatchRun=watch) as target:
        result = CliRunner().invoke(cli, ["--trainer", target, "run", "watch", "abcabcabcabc"])
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "run abcabcabcabc: RUNNING",
        "step 1/9  loss 2  1234 tokens/s",
        "step 9  evaluation:  agreement 0.5  kl 0.25",
        "run abcabcabcabc: FAILED at step 9/9",
        r"Out of \x1b[31mmemory. Halve optimizer.micro_batch_size.",
        "`stillhouse run logs abcabcabcabc` shows its log; it has no checkpoint yet, so `stillhouse run resume abcabcabcabc` starts it again from the first step.",
    ]


def test_a_log_resumes_at_the_next_byte() -> None:
    whole = "Schüsse\nfertig\n".encode()
    asked: list[int] = []

    def logs(request: Any) -> Iterator[run_pb2.StreamLogsResponse]:
        asked.append(request.start_offset)
        if len(asked) == 1:
            yield run_pb2.StreamLogsResponse(data=whole[:4], next_offset=4)
            raise GONE
        yield run_pb2.StreamLogsResponse(data=whole[request.start_offset :], next_offset=len(whole))

    with odd_service(StreamLogs=logs) as target:
        result = CliRunner().invoke(cli, ["--trainer", target, "run", "logs", "abcabcabcabc", "-f"])
    assert (result.exit_code, result.stdout, asked) == (0, whole.decode(), [0, 4])


class Files:
    """Artifacts of a faulty trainer: it breaks off after `most` bytes and may state another SHA-256."""

    def __init__(self, content: dict[str, bytes], *, most: int = 1 << 30, stated: str = "") -> None:
        self.content, self.most, self.stated = content, most, stated
        self.asked: list[tuple[str, int]] = []

    def sha256(self, path: str) -> str:
        return self.stated or hashlib.sha256(self.content[path]).hexdigest()

    def artifacts(self, _: Any) -> Iterator[run_pb2.ListArtifactsResponse]:
        yield run_pb2.ListArtifactsResponse(
            artifacts=[
                run_pb2.Artifact(path=path, size_bytes=len(content), sha256=self.sha256(path))
                for path, content in self.content.items()
            ]
        )

    def download(self, request: Any) -> Iterator[run_pb2.DownloadArtifactResponse]:
        self.asked.append((request.path, request.start_offset))
        rest = self.content[request.path][request.start_offset :]
        yield run_pb2.DownloadArtifactResponse(data=rest[: self.most])
        if len(rest) > self.most:
            raise GONE
        yield run_pb2.DownloadArtifactResponse(sha256=self.sha256(request.path))

    def pull(self, directory: Path | str, what: str = "final") -> list[Path]:
        with (
            odd_service(ListArtifacts=self.artifacts, DownloadArtifact=self.download) as target,
            Trainer(target) as trainer,
        ):
            return RunHandle(trainer, NAME).pull(what, directory)


def test_a_broken_download_is_resumed(tmp_path: Path) -> None:
    files = Files({"final/a/weights": bytes(range(10))}, most=4)
    assert files.pull(tmp_path / "out") == [tmp_path / "out" / "a" / "weights"]
    assert (tmp_path / "out/a/weights").read_bytes() == bytes(range(10))
    assert files.asked == [("final/a/weights", 0), ("final/a/weights", 4), ("final/a/weights", 8)]


def test_a_partial_file_is_resumed_and_a_complete_file_is_kept(tmp_path: Path) -> None:
    files = Files({"final/x": b"0123456789"})
    (tmp_path / "x.part").write_bytes(b"01234")
    files.pull(tmp_path)
    files.pull(tmp_path)
    assert (tmp_path / "x").read_bytes() == b"0123456789"
    assert files.asked == [("final/x", 5)]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_partial_file_of_another_artifact_is_discarded(tmp_path: Path) -> None:
    files = Files({"final/x": b"0123456789"})
    (tmp_path / "x.part").write_bytes(b"other")
    files.pull(tmp_path)
    assert (tmp_path / "x").read_bytes() == b"0123456789"
    assert files.asked == [("final/x", 5), ("final/x", 0)]


def test_a_wrong_sha256_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match="arrived with another SHA-256") as caught:
        Files({"final/x": b"0123"}, stated="0" * 64).pull(tmp_path)
    assert caught.value.reason is Reason.CHECKPOINT_CORRUPT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["final/../../x", "final/a\\b", "final/\x1b[1m", "/final/x", "final/.."])
def test_a_trainer_cannot_write_elsewhere(tmp_path: Path, path: str) -> None:
    with pytest.raises(StillhouseError, match="leaves the directory; refused"):
        Files({path: b"0123"}).pull(tmp_path, what="" if path.startswith("/") else "final")
    assert list(tmp_path.rglob("*")) == []


def test_an_absent_artifact_is_named_with_the_existing_ones(tmp_path: Path) -> None:
    files = Files({"final/x": b"0", "checkpoints/10/state": b"0", "spec.json": b"{}"})
    with pytest.raises(
        StillhouseError, match=r'has no artifact "finale"; it has: checkpoints/10, final, spec\.json'
    ):
        files.pull(tmp_path, what="finale")


def test_a_checkpoint_is_pulled_as_a_model_without_what_only_a_resume_needs(tmp_path: Path) -> None:
    model = ["model.safetensors", "config.json", "base/config.json"]
    state = ["weights.safetensors", "optimizer.pt", "state.json", "MANIFEST.json"]
    files = Files({f"checkpoints/10/{name}": b"0" for name in (*model, *state)})
    assert files.pull(tmp_path / "new", what="checkpoints/10") == [tmp_path / "new" / each for each in model]
    assert files.pull(tmp_path / "one", what="checkpoints/10/optimizer.pt")
    for what in ("checkpoints", "checkpoints/", "checkpoints/10/", "./checkpoints//10", ""):
        pulled = files.pull(tmp_path / "again", what=what)
        assert sorted(each.name for each in pulled) == sorted(Path(each).name for each in model), what
    older = Files({f"checkpoints/10/{name}": b"0" for name in state})
    assert len(older.pull(tmp_path / "old", what="checkpoints/10")) == len(state)


def test_one_file_is_pulled_under_the_name_that_is_given(tmp_path: Path) -> None:
    files = Files({"spec.json": b"{}", "final/config.json": b"0"})
    assert files.pull(tmp_path / "cc.json", what="spec.json") == [tmp_path / "cc.json"]
    assert (tmp_path / "cc.json").read_bytes() == b"{}"
    (tmp_path / "there").mkdir()
    assert files.pull(tmp_path / "there", what="spec.json") == [tmp_path / "there" / "spec.json"]
    assert files.pull(f"{tmp_path}/new/", what="spec.json") == [tmp_path / "new" / "spec.json"]
    assert files.pull(tmp_path / "model.d", what="final") == [tmp_path / "model.d" / "config.json"]


def test_a_pulled_adapter_names_the_base_beside_it(tmp_path: Path) -> None:
    config = json.dumps({"r": 4, "base_model_name_or_path": "/elsewhere/final/base"}).encode()
    files = {"final/adapter_config.json": config, "final/base/config.json": b"{}"}
    for _ in range(2):
        Files(files).pull(tmp_path / "student")
        found = json.loads((tmp_path / "student" / "adapter_config.json").read_bytes())
        assert found == {"r": 4, "base_model_name_or_path": str(tmp_path / "student" / "base")}
    with pytest.raises(StillhouseError, match="is not the configuration of an adapter"):
        Files({**files, "final/adapter_config.json": b"["}).pull(tmp_path / "odd")
    Files({"final/adapter_config.json": config}).pull(tmp_path / "alone")
    assert (tmp_path / "alone" / "adapter_config.json").read_bytes() == config
