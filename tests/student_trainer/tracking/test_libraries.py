"""The real libraries without a server: what their own readers find of a run, over a stop and a kill; and servers that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stillhouse.student_trainer.tracking.place import Place
from stillhouse.student_trainer.tracking.session import place_path
from tests.student_trainer.tracking.conftest import Libraries
from tests.student_trainer.tracking.tracked import RUN_ID, make_run, track, write_attempt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LOSSES = {step: 1 / step for step in range(1, 7)}
READERS: Mapping[str, str] = {
    "wandb": """
import struct
from wandb.proto.wandb_internal_pb2 import Record

def records(path):  # LevelDB's log format
    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""

found, settings, links, tables = {}, {}, {}, []
for path in sorted(folder.rglob("*.wandb")):
    for record in records(path):
        for item in record.run.config.update:
            settings[item.key] = json.loads(item.value_json)
        for item in record.summary.update:
            links[item.key] = json.loads(item.value_json)
        values = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in values:
            found.setdefault(values["_step"], []).append(values["train/loss"])
        tables += [name for name in values if name.startswith("texts")]
rate = settings["optimizer"]["learning_rate"]
""",
    "mlflow": """
from mlflow import MlflowClient
client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
[run] = client.search_runs([client.get_experiment_by_name("stillhouse").experiment_id])
found = {}
for each in client.get_metric_history(run.info.run_id, "train/loss"):
    found.setdefault(each.step, []).append(each.value)
rate, links = run.data.params["optimizer.learning_rate"], run.data.tags
tables = [each.path for each in client.list_artifacts(run.info.run_id)]
assert run.info.status == "FINISHED" and run.info.run_name == "my run", run.info
assert run.data.metrics["teacher/my teacher.0"] == 2
""",
    "trackio": """
import sqlite3
db = sqlite3.connect(folder / "stillhouse.db")
[[config]] = db.execute("select config from configs").fetchall()
rate, found, links, tables = json.loads(config)["optimizer"]["learning_rate"], {}, {}, []
for step, metrics in db.execute("select step, metrics from metrics order by id"):
    values = json.loads(metrics)
    if "train/loss" in values:
        found.setdefault(step, []).append(values["train/loss"])
    tables += [name for name in values if name.startswith("texts")]
    for row in values.get("final_model", {}).get("_value", ()):
        links[row["what"]] = row["where"]
""",
    "swanlab": """
import yaml
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.sdk.internal.core_python.store import DataStoreReader
found, tables = {}, []
for path in sorted(folder.rglob("*.swanlab")):
    reader = DataStoreReader()
    reader.open(path)
    for data in reader:
        record = Record.FromString(data)
        assert not record.HasField("log"), record  # what the process logs is no part of the run
        if record.scalar.key == "train/loss":
            found.setdefault(record.scalar.step, []).append(record.scalar.value.number)
        tables += [record.media.key] if record.HasField("media") else []
settings = [yaml.safe_load(each.read_text()) for each in sorted(folder.rglob("config.yaml"))][-1]
rate = settings["optimizer"]["value"]["learning_rate"]
links = {name: each["value"] for name, each in settings.items()}
""",
}


def read(kind: str, folder: Path, path: Path) -> dict[str, Any]:
    """The rows that the library's own readers find in the files of a tracker."""
    script = f"import json, sys\nfrom pathlib import Path\nfolder = Path({str(folder)!r})\n{READERS[kind]}\n"
    script += "print(json.dumps({'losses': found, 'rate': float(rate), 'model': links['final_model'], 'tables': tables}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio", "swanlab"])
def test_files_hold_each_step_once_with_settings_examples_and_links(
    kind: str, tracker_libraries: Libraries, tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path, kind)
    write_attempt(run_dir, 1, [1, 2, 3, 4], end="stopped")
    first = track(run_dir, kind, path=tracker_libraries[kind])
    assert first.returncode == 0, first.stderr
    write_attempt(run_dir, 2, [3, 4, 5, 6], end="completed")
    second = track(run_dir, kind, path=tracker_libraries[kind])
    assert second.returncode == 0, second.stderr
    place = Place.load(place_path(run_dir, kind))
    assert (place.step, place.ended, place.pending) == (6, "COMPLETED", False)
    folder = run_dir.path / "trackers" / kind
    told = read(kind, folder, tracker_libraries[kind])
    assert {int(step): values for step, values in told["losses"].items()} == {
        step: [loss] for step, loss in LOSSES.items()
    }
    assert told["rate"] == 1e-5
    assert told["model"] == f"runs/{RUN_ID}/final"
    assert any(name.startswith("texts_after") for name in told["tables"])


class Blackhole(ThreadingHTTPServer):
    """Answers nothing, or refuses everything."""

    daemon_threads = True

    def __init__(self, *, answers: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.seen: list[str] = []
        self.released = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Blackhole

    def do_GET(self) -> None:
        self.server.seen.append(self.headers.get("authorization", ""))
        if not self.server.answers:
            self.server.released.wait(300)
        self.send_response(403)
        self.end_headers()

    do_POST = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(params=[True, False], ids=["refuses", "hangs"])
def server(request: pytest.FixtureRequest) -> Iterator[Blackhole]:
    with Blackhole(answers=request.param) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield made
        made.released.set()
        made.shutdown()
        thread.join()


def test_a_server_that_fails_ends_the_process_with_a_warning_and_no_secret(
    server: Blackhole, tracker_libraries: Libraries, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    run_dir = make_run(tmp_path, {"kind": "mlflow", "uri": url})
    write_attempt(run_dir, 1, [1], end="completed")
    secrets = {"MLFLOW_TRACKING_URI": url, "MLFLOW_TRACKING_TOKEN": "a-very-secret-key"}
    done = track(run_dir, "mlflow", path=tracker_libraries["mlflow"], timeout_s=400, **secrets)
    assert done.returncode == 1
    assert "metrics are in the run's directory" in done.stderr
    assert "a-very-secret-key" not in done.stderr + done.stdout
    assert server.seen[0] == "Bearer a-very-secret-key"
    assert not Place.load(place_path(run_dir, "mlflow")).id
