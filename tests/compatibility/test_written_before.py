"""Opens what earlier versions have written: runs and their history, caches and tokens; a half-done run ends with the same weights, to rounding.

make_written.py has made the archives, and told.json in each of them what that version's client said.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from stillhouse import Reason, RunHandle, StillhouseError, Trainer
from stillhouse.protos.cache.format import COMPACT_BITS
from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.compatibility.make_written import STEPS, arithmetic
from tests.support.processes import no_process_left
from tests.support.programs import start_trainer
from tests.support.runs import Service, completed, stillhouse

pytestmark = pytest.mark.model

ARCHIVES = sorted(Path(__file__).parent.glob("written_by_*.tar.xz"))
CLOSE = 1e-6
"""Between weights; training moves them by 6e-3, and other kernels, or another order of rounding, by 2e-7."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """An unpacked archive."""

    root: Path
    told: Mapping[str, Any]
    """Name of a run, or "caches", to what was said of it then."""

    @property
    def data_dir(self) -> Path:
        return self.root / "data"

    @property
    def token_file(self) -> Path:
        return self.root / "token"

    def run_id(self, name: str) -> str:
        return str(self.told[name]["shown"]["id"])

    @contextmanager
    def served(self) -> Iterator[Service]:
        """A run service on the data directory, with the arithmetic of back then."""
        with (
            no_process_left() as mark,
            start_trainer(
                self.data_dir,
                directory=self.root,
                options=["--cpu-slots", "4096", "--stop-runs-on-exit"],
                environment={**mark, **self.told["environment"]},
            ) as program,
        ):
            yield Service(program=program, data_dir=self.data_dir)

    @contextmanager
    def trainer(self, service: Service) -> Iterator[Trainer]:
        """A client with the token."""
        with Trainer(service.target, token=self.token_file.read_text().strip()) as client:
            yield client


def unpack(archive: Path, root: Path) -> Written:
    """The archive below `root`, where its data directory has moved to: runs name their files by absolute paths."""
    with tarfile.open(archive) as file:
        file.extractall(root, filter="data")
    told = json.loads((root / "told.json").read_text())
    for path in root.glob("data/runs/*/effective_spec.json"):
        path.write_text(path.read_text().replace(told["root"], str(root)))
    return Written(root=root, told=told)


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """For tests that change nothing."""
    return unpack(request.param, tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module")
def service(written: Written) -> Iterator[Service]:
    with written.served() as service:
        yield service


@pytest.mark.parametrize("name", ["built", "finished", "half_done"])
def test_a_run_shows_what_it_showed(name: str, written: Written, service: Service) -> None:
    token = ("--token-file", str(written.token_file), "--json")
    run, told = written.run_id(name), written.told[name]
    shown = json.loads(service.stillhouse("run", "show", run, *token).stdout)
    assert_still_says(shown, told["shown"])
    metrics = json.loads(service.stillhouse("run", "metrics", run, *token).stdout)
    assert metrics["series"] == told["metrics"]
    listed = json.loads(service.stillhouse("run", "list", *token).stdout)["runs"]
    assert [each["id"] for each in listed] == [
        written.run_id(each) for each in ("half_done", "finished", "built")
    ]


def assert_still_says(found: Any, told: Any) -> None:
    """Fails unless everything `told` is found; fields may have come to it."""
    if isinstance(told, dict):
        for key, value in told.items():
            assert key in found
            assert_still_says(found[key], value)
    elif isinstance(told, list):
        assert len(found) == len(told)
        for each, value in zip(found, told, strict=True):
            assert_still_says(each, value)
    else:
        assert found == told


def test_history_checkpoints_and_final_weights_are_there(
    written: Written, service: Service, tmp_path: Path
) -> None:
    with written.trainer(service) as trainer:
        finished, half_done = (trainer.run(written.run_id(name)) for name in ("finished", "half_done"))
        assert states(finished) == [Run.STATE_STARTING, Run.STATE_RUNNING, Run.STATE_COMPLETED]
        assert states(half_done)[-2:] == [Run.STATE_STOPPING, Run.STATE_STOPPED]
        assert b"run stopped" in b"".join(piece.data for piece in half_done.logs())
        assert checkpoints(finished) == {STEPS}
        assert checkpoints(half_done) == {5}
        finished.pull("final", tmp_path)
    kept = service.run_path(finished.name) / "final"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in kept.iterdir()}
    assert (tmp_path / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()


def states(run: RunHandle) -> list[Run.State.ValueType]:
    """Every state of the run after its first event, each once."""
    events = [event.run.state for event in run.watch(after_sequence=1) if event.WhichOneof("event") == "run"]
    return list(dict.fromkeys(events))


def checkpoints(run: RunHandle) -> set[int]:
    """Steps of the checkpoints that it offers."""
    paths = [artifact.path.split("/") for artifact in run.artifacts()]
    return {int(path[1]) for path in paths if path[0] == "checkpoints"}


@pytest.mark.parametrize("name", ["lossless", "compact"])
def test_a_cache_is_read(name: str, written: Written) -> None:
    path, told = written.data_dir / "caches" / name, written.told["caches"][name]
    found = json.loads(stillhouse("cache", "info", str(path), "--json").stdout)
    assert_still_says(found, {**told, "cache": str(path)})
    verified = json.loads(stillhouse("cache", "verify", str(path), "--json").stdout)
    assert (verified["sequences"], verified["damaged"]) == (told["sequences"], {})


def test_every_answer_is_found_and_the_compact_ones_are_close(written: Written) -> None:
    lossless, compact = (CacheReader(written.data_dir / "caches" / name) for name in ("lossless", "compact"))
    for shard in lossless.shards:
        for token_ids, start, _ in lossless.texts(shard):
            key = shard.meta.key(token_ids, start)
            exact, rounded = lossless.get(key, shard.meta), compact.get(key, shard.meta)
            assert exact is not None
            assert rounded is not None
            assert exact.num_rows == len(token_ids) - start
            np.testing.assert_array_equal(rounded.token_ids, exact.token_ids)
            np.testing.assert_allclose(rounded.logprobs, exact.logprobs, rtol=2**-COMPACT_BITS)
    assert len(lossless) == len(compact) == written.told["caches"]["lossless"]["sequences"]
    lossless.close()
    compact.close()


def test_a_token_opens_a_service_that_is_closed_to_others(written: Written, service: Service) -> None:
    with written.trainer(service) as trainer:
        assert len(list(trainer.runs())) == 3
    for token in (None, written.token_file.read_text().strip()[:-1] + "-"):
        with Trainer(service.target, token=token) as stranger, pytest.raises(StillhouseError) as refused:
            list(stranger.runs())
        assert refused.value.reason is Reason.UNAUTHENTICATED
    listed = stillhouse("token", "list", "--file", str(written.data_dir / "tokens.json"), "--json")
    (row,) = json.loads(listed.stdout)["tokens"]
    assert (row["name"], row["scopes"], row["expired"]) == ("ada", ["submit"], False)


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
def test_a_half_done_run_ends_with_the_weights_that_it_would_have_had(archive: Path, tmp_path: Path) -> None:
    written = unpack(archive, tmp_path)
    told = written.told
    with written.served() as service, written.trainer(service) as trainer:
        handle = trainer.run(written.run_id("half_done"))
        handle.resume()
        run = completed(handle, service)
        metrics = json.loads(
            service.stillhouse(
                "run", "metrics", handle.id, "--token-file", str(written.token_file), "--json"
            ).stdout
        )["series"]
    assert [attempt.number for attempt in run.attempts] == [1, 2]
    assert run.attempts[1].first_step == 6
    assert run.progress.step == STEPS
    file, expected = service.run_path(run.name) / "final/model.safetensors", tmp_path / "resumed.safetensors"
    weights, kept = load_file(file), load_file(expected)
    assert weights.keys() == kept.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, kept[name], rtol=0, atol=CLOSE, err_msg=name)
    if arithmetic() == told["arithmetic"]:
        # Updates and sums are rounded in another order since then: their last bits differ.
        for name in ("train/loss", "eval/kl"):
            found, before = metrics[name], told["resumed"]["metrics"][name]
            assert found["steps"] == before["steps"]
            np.testing.assert_allclose(found["values"], before["values"], rtol=1e-6, err_msg=name)


def test_datasets_uploaded_before_are_listed_and_named_by_their_content(
    written: Written, service: Service
) -> None:
    with written.trainer(service) as trainer:
        found = list(trainer.datasets())
        assert [each.name for each in found] == [f"datasets/{each.sha256}" for each in found]
        used = trainer.run(written.run_id("finished")).get().effective_spec.data.train[0].path
        assert [each.sha256 for each in found] == [Path(used).stem]
        assert (
            trainer.dataset(found[0].name).size_bytes
            == (service.data_dir / "datasets" / Path(used).name).stat().st_size
        )
