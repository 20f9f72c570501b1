"""Rollouts through kills, lag and lost texts: no text is taken for that of another version, and none that is missing shrinks a step unseen."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.protos.rpc import tokens as auth_tokens
from stillhouse.protos.rpc.tokens import Scope
from stillhouse.student_trainer.run_dir import EXIT_FAILED, MANIFEST
from stillhouse.student_trainer.train.checkpointing.checkpoint import OPTIMIZER
from stillhouse.student_trainer.train.process import failpoints
from stillhouse.student_trainer.train.teacher.credentials import CREDENTIALS_VARIABLE
from tests.conftest import Models
from tests.student_trainer.train.runs import (
    assert_same_end,
    events,
    failure,
    finish,
    finish_here,
    make_run,
    metric,
    spec_of,
    start,
)
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher

STEPS = 4
DEADLINE_S = 120.0
SHORT = {"max_new_tokens": 6, "samples_per_prompt": 2}


def student_context(loss: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    source = {"generation": SHORT, "min_teacher_logprob": -1000, **settings}
    term = {"divergence": "reverse_kl", **(loss or {})}
    return {"student": source, "loss": {"terms": [term], "top_k": 8}}


def spec_with(models: Models, data: Path, target: str, *contexts: Any, **further: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "max_steps": STEPS,
        "micro_batch_size": 4,
        "grad_accum_steps": 1,
        "learning_rate": 1e-3,
    }
    common: dict[str, Any] = {"optimizer": sizes, "checkpoint": {"every_steps": 1, "keep": 10}}
    return spec_of(models.student, data, target, contexts=list(contexts), **common | further)


def test_kills_in_a_mixed_run_change_nothing(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    mixed: tuple[dict[str, Any], ...] = (
        {"dataset": {}},
        {"teacher": {"generation": SHORT}},
        student_context(max_staleness=1),
        student_context({"estimator": "policy_gradient", "baseline": "group"}, max_staleness=1),
    )
    spec = spec_with(models, dataset_file, hf_teacher.target, *mixed)
    spec["optimizer"]["max_steps"] = 12
    whole = make_run(tmp_path, "whole", spec)
    assert finish_here(whole) == 0, events(whole)
    generator = random.Random(11)
    killed = make_run(tmp_path, "killed", spec)
    with no_process_left() as mark:
        for attempt in (1, 2):
            process = start(killed, attempt, mark)
            wanted, deadline = len(metric(killed, "train/loss")) + 2, time.monotonic() + DEADLINE_S
            while len(metric(killed, "train/loss")) < wanted and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(generator.uniform(0, 0.2))
            process.kill()
            process.wait()
    assert finish_here(killed, 3) == 0, events(killed)
    assert_same_end(killed, whole)


def rewrite_rollouts(checkpoint: Path, change: Any) -> int:
    """Applies `change` to each text in flight, and the number of texts."""
    state = torch.load(checkpoint / OPTIMIZER, weights_only=True)
    rollouts = [rollout for each in state["in_flight"] for rollout in each["rollouts"]]
    for number, rollout in enumerate(rollouts):
        change(number, rollout)
    torch.save(state, checkpoint / OPTIMIZER)
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    data = (checkpoint / OPTIMIZER).read_bytes()
    manifest["files"][OPTIMIZER] = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    return len(rollouts)


def test_texts_that_lag_are_dropped_counted_and_not_learnt(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    spec = spec_with(models, dataset_file, hf_teacher.target, student_context(max_staleness=1))
    whole = make_run(tmp_path, "whole", spec)
    assert finish_here(whole) == 0
    lagging = make_run(tmp_path, "lagging", spec)
    checkpoint = lagging.checkpoint_path(2)
    whole.checkpoint_path(2).rename(checkpoint)
    lengths: list[int] = []

    def lag(number: int, rollout: dict[str, Any]) -> None:
        """Two of the eight texts of step 3 become two updates old."""
        assert rollout["version"] == 1
        if number in (0, 5):
            rollout["version"] = 0
        else:
            lengths.append(len(rollout["token_ids"]) - rollout["start"])

    assert rewrite_rollouts(checkpoint, lag) == 8
    before = metric(whole, "train/trained_tokens")[2]
    assert finish_here(lagging) == 0
    assert metric(lagging, "train/rollouts_dropped")[3] == 2
    # The step's denominator is exactly what was left.
    assert metric(lagging, "train/trained_tokens")[3] - before == sum(lengths)
    assert metric(lagging, "train/rollout_staleness")[3] == pytest.approx((6 * 1 + 2 * 2) / 8)


@pytest.fixture(scope="module")
def writer(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Program, Path]]:
    """A service on the student's base that wants a token, and the trainer's file of credentials."""
    root = tmp_path_factory.mktemp("writer")
    tokens = root / "tokens.json"
    token, _ = auth_tokens.create(tokens, name="trainer", scopes=[Scope.INFER, Scope.ADMIN], lifetime_s=3600)
    (root / "writer.token").write_text(token + "\n")
    credentials = root / "credentials.toml"
    credentials.write_text(f'[writer]\ntoken_file = "{root / "writer.token"}"\n')
    credentials.chmod(0o600)
    options = ["--dtype", "float32", "--threads", "1", "--max-adapters", "2", "--tokens", str(tokens)]
    with (
        no_process_left() as mark,
        start_teacher(
            models.student, engine="hf", directory=root, options=options, environment=mark
        ) as program,
    ):
        yield program, credentials


def test_a_kill_between_loading_and_writing_gives_no_text_a_wrong_version(
    *,
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    writer: tuple[Program, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, credentials = writer
    source = {"rollout_target": program.target, "rollout_credential": "writer", "max_staleness": 0}
    spec = spec_with(
        models,
        dataset_file,
        hf_teacher.target,
        student_context({"estimator": "policy_gradient"}, **source),
        student={"model": str(models.student), "lora": {"rank": 4}, "output": "merged"},
    )
    monkeypatch.setenv(CREDENTIALS_VARIABLE, str(credentials))
    whole = make_run(tmp_path, "whole", spec)
    assert finish_here(whole) == 0, events(whole)
    killed = make_run(tmp_path, "killed", spec)
    with no_process_left() as mark:
        where = {failpoints.VARIABLE: "rollouts.after_load:3"}
        assert finish(killed, 1, {**mark, **where}) == -signal.SIGKILL
    assert len(metric(killed, "train/loss")) == 2
    assert finish_here(killed, 2) == 0, events(killed)
    for weight in metric(killed, "train/importance_weight").values():
        assert weight == pytest.approx(1, abs=1e-4)
    assert metric(killed, "train/loss") == pytest.approx(metric(whole, "train/loss"), abs=1e-5)

    source["rollout_credential"] = "nobody"
    spec["contexts"] = [student_context({"estimator": "policy_gradient"}, **source)]
    refused = make_run(tmp_path, "refused", spec)
    assert finish_here(refused) == EXIT_FAILED
    assert 'contexts[0].student.rollout_credential is "nobody"' in failure(refused)
