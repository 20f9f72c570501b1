"""Caches from the command line: built by a run, listed, shown, pulled and checked; then a run learns with the teacher gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stillhouse.client.api import Trainer
from stillhouse.client.cli import cli
from stillhouse.client.trainer.run_handle import RunHandle
from stillhouse.protos.errors import StillhouseError
from tests.conftest import Models
from tests.support.networks.counting_proxy import counting_proxy
from tests.support.programs import Program
from tests.support.runs import Service, completed, curve, small_spec, write_run_file


def test_a_cache_is_built_and_learnt_from_without_a_teacher(
    *,
    hf_teacher: Program,
    service: Service,
    trainer: Trainer,
    models: Models,
    dataset_file: Path,
    tmp_path: Path,
) -> None:
    place = {"path": "caches/for-commands", "mode": "only"}
    proxy, counts = counting_proxy(hf_teacher.target)
    with proxy:
        spec = small_spec(
            student=models.student,
            train=dataset_file,
            teacher=proxy.target,
            steps=6,
            changes={"cache": place, "checkpoint": {"every_steps": 3}},
        )
        file = write_run_file(tmp_path / "run.yaml", spec)
        built = service.stillhouse("cache", "build", str(file), "--watch")
        assert "COMPLETED" in built.stdout
        assert "bytes per token" in built.stdout
        assert (counts.asked(16), counts.asked(24)) == (48, 16)
        online = trainer.create_run({**spec, "cache": {"path": "caches/unused", "mode": "write_through"}})
        completed(online, service)

    only = trainer.create_run(spec)  # its teacher no longer listens
    completed(only, service)
    assert curve(only) == pytest.approx(curve(online), abs=1e-5)
    assert curve(only, "eval/kl") == pytest.approx(curve(online, "eval/kl"), abs=1e-5)

    of_cache, of_teacher = (_examples(each, tmp_path / each.id) for each in (only, online))
    assert (of_cache["from_cache"], of_teacher["from_cache"]) == (True, False)
    assert of_cache["teacher_top_k"] == 24
    assert _kl(of_cache) == pytest.approx(_kl(of_teacher), abs=2e-4)

    listed = json.loads(_here("--trainer", service.target, "cache", "list", "--json"))["caches"]
    assert {each["path"]: each["use"] for each in listed}["caches/for-commands"] == "only"
    told = json.loads(_here("--trainer", service.target, "cache", "info", "caches/for-commands", "--json"))
    assert told["sequences"] == 64
    assert {kind["top_k"] for kind in told["kinds"]} == {16, 24}
    local = service.data_dir / "caches" / "for-commands"
    assert "64 sequences" in _here("cache", "info", str(local))

    trainer.run(_build(trainer)).pull("exports/cache", tmp_path / "pulled")
    assert "Intact: " in _here("cache", "verify", str(tmp_path / "pulled"))
    shard = next((tmp_path / "pulled").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in _here("cache", "verify", str(tmp_path / "pulled"), expect=1)
    assert "no cache at" in _here("cache", "verify", str(tmp_path / "nowhere"), expect=4)


def _examples(run: RunHandle, folder: Path) -> dict[str, Any]:
    """The examples of the last evaluation, as artifacts."""
    assert "evaluations/examples/6.json" in {each.path for each in run.artifacts()}
    [path] = run.pull("evaluations/examples/6.json", folder)
    document: dict[str, Any] = json.loads(path.read_bytes())
    return document


def _kl(document: dict[str, Any]) -> list[float]:
    return [target["kl"] for row in document["rows"] for target in row["targets"]]


def _build(trainer: Trainer) -> str:
    return next(
        run.name.removeprefix("runs/") for run in trainer.runs() if run.effective_spec.task == "cache"
    )


def _here(*arguments: str, expect: int = 0) -> str:
    """Output of the command line, run in this process."""
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == expect, done.output
    return done.output


def test_what_a_cache_may_not_be_is_refused_at_once(trainer: Trainer, models: Models, tmp_path: Path) -> None:
    spec = small_spec(student=models.student, train=tmp_path, teacher="127.0.0.1:1")
    for path in ("datasets/mine", str(tmp_path), "caches/../../elsewhere", "caches/", ""):
        with pytest.raises(StillhouseError, match=r"cache\.path"):
            trainer.validate({**spec, "task": "cache", "cache": {"path": path}})
    trainer.validate({**spec, "task": "cache", "cache": {"path": "caches/mine"}})
