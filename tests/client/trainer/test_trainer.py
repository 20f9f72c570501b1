"""`stillhouse run` and `data` against a real run service, with a real teacher behind it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from stillhouse.client.api import Trainer
from stillhouse.client.cli import cli
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.conftest import Models
from tests.support.programs import Program

STEPS = 4


def command(target: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--trainer", target, *arguments])


def run_file(directory: Path, models: Models, teacher: str, data: str, **student: str) -> Path:
    path = directory / "run.yaml"
    spec = {
        "displayName": "of a test",
        "student": {"model": str(models.student)} | student,
        "teachers": [{"targets": [teacher]}],
        "data": {"train": [{"path": data}], "maxSequenceTokens": 64},
        "optimizer": {"microBatchSize": 4, "maxSteps": STEPS, "learningRate": 1e-3},
        "evaluation": {"everySteps": 2, "limit": 4},
        "labels": {"kind": "test"},
    }
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


def test_a_run_from_its_file_to_its_model(
    trainer_service: Callable[..., Program],
    hf_teacher: Program,
    models: Models,
    dataset_file: Path,
    tmp_path: Path,
) -> None:
    target = trainer_service().target
    shutil.copy(dataset_file, tmp_path / "rows.jsonl")
    path = run_file(tmp_path, models, hf_teacher.target, "rows.jsonl")

    watched = command(target, "run", "create", str(path), "--push", "--watch")
    assert watched.exit_code == 0, watched.output
    told = watched.stdout.splitlines()
    run_id = told[0].split()[1]
    assert told[0] == f"run {run_id} created"
    assert told[-2].startswith(f"run {run_id}: COMPLETED at step {STEPS}/{STEPS} after ")
    assert told[-1] == (
        f"The model is runs/{run_id}/final on the trainer's host; `stillhouse run pull {run_id}` copies it here."
    )
    assert any(line.startswith(f"step {STEPS}  evaluation:") for line in told)
    assert f"copying {tmp_path / 'rows.jsonl'} to the trainer" in watched.stderr

    events = [
        json.loads(line) for line in command(target, "run", "watch", "latest", "--json").stdout.splitlines()
    ]
    sequences = [event["sequence"] for event in events]
    assert sequences == sorted(set(sequences))
    assert events[-1]["run"]["state"] == "COMPLETED"

    shown = json.loads(command(target, "run", "show", run_id[:5], "--json").stdout)
    assert (shown["id"], shown["state"], shown["progress"]["step"]) == (run_id, "COMPLETED", STEPS)
    assert shown["create_time"].endswith("Z")
    assert shown["effective_spec"]["optimizer"]["max_steps"] == STEPS
    assert shown["spec"]["data"]["train"][0]["path"].startswith("datasets/")
    assert shown["latest_metrics"]["train/loss"]["step"] == STEPS
    text = command(target, "run", "show", "latest").stdout
    first = [line.split()[0] for line in text.splitlines()[:3]]
    assert (text.startswith("state       COMPLETED\n"), first) == (True, ["state", "next", "run"])
    assert "Effective settings" not in text
    assert "  grad_accum_steps: 1\n" in command(target, "run", "show", "latest", "--settings").stdout
    assert "label kind  test" in text
    assert re.search(r"^pace +\d+\.\d\d s a step: .*\d\.\d\d of training$", text, re.MULTILINE)
    assert "\nAttempts\n  1  " in text
    listed = command(target, "run", "list", "--state", "completed").stdout
    assert run_id in listed
    assert "of a test" in listed
    assert json.loads(command(target, "run", "list", "--json").stdout)["runs"][0]["id"] == run_id

    series = json.loads(command(target, "run", "metrics", "latest", "--json").stdout)["series"]
    assert series["train/loss"]["steps"] == list(range(1, STEPS + 1))
    assert command(target, "run", "metrics", "latest", "--key", "eval/kl").stdout.startswith(
        "step  eval/kl\n"
    )
    table = command(target, "run", "metrics", "latest", "--max-points", "2").stdout.splitlines()
    assert table[0].split() == ["step", "train/loss", "eval/kl", "eval/perplexity", "eval/agreement"]
    assert [len(row.split()) for row in table[1:3]] == [5, 5], "steps that have a loss and an evaluation"
    assert (table[3], "train/learning_rate" in table[4]) == ("", True)
    assert "train/loss" in command(target, "run", "plot", "latest").stdout
    assert "eval/kl" in command(target, "run", "plot", "latest", "--key", "nothing").stdout
    log = command(target, "run", "logs", "latest").stdout
    pieces = command(target, "run", "logs", "latest", "-f", "--json").stdout.splitlines()
    assert "".join(json.loads(piece)["text"] for piece in pieces) == log
    assert command(target, "run", "logs", "latest", "--tail-bytes", "20").stdout == log[-20:]

    artifacts = json.loads(command(target, "run", "artifacts", "latest", "--json").stdout)["artifacts"]
    pulled = command(target, "run", "pull", "latest", "--to", str(tmp_path / "student"))
    assert pulled.exit_code == 0, pulled.output
    final = {each["path"].removeprefix("final/") for each in artifacts if each["path"].startswith("final/")}
    assert {path.name for path in (tmp_path / "student").iterdir()} == final
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= final
    assert command(target, "run", "pull", "latest", "nothing").exit_code == 4

    unlearnt = command(target, "run", "resume", run_id, "--set", "optimizer.precison=bf16")
    assert (unlearnt.exit_code, "precision" in unlearnt.stderr) == (2, True), unlearnt.output
    for verb, code in (("stop", 5), ("resume", 5), ("delete", 0), ("show", 4)):
        result = command(target, "run", verb, run_id)
        assert result.exit_code == code, result.output


def test_problems_that_the_service_finds_point_into_the_file(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    target = trainer_service().target
    path = run_file(tmp_path, models, "127.0.0.1:1", str(dataset_file))
    fine = command(target, "run", "create", str(path), "--validate", "--json")
    assert fine.exit_code == 0, fine.output
    assert json.loads(fine.stdout)["effective_spec"]["optimizer"]["name"] == "adamw"

    text = (
        path.read_text().replace(str(models.student), "/absent/model").replace("maxSteps: 4", "maxSteps: 0")
    )
    path.write_text(text + "loss: {terms: [{divergence: forward_lk}]}\n")
    result = command(target, "run", "create", str(path), "--set", "optimizer.name=adamx")
    assert result.exit_code == 2
    problems = result.stderr.splitlines()
    assert problems[0].startswith(f'{path}:3:10: student.model: "/absent/model" ')
    assert problems[1].startswith(f"{path}:13:13: optimizer.maxSteps: 0 ")
    assert problems[2].startswith(
        f'{path}:20:29: loss.terms[0].divergence: "forward_lk" is not known; did you mean "forward_kl"?'
    )
    assert problems[3].startswith(
        '--set optimizer.name=adamx: optimizer.name: "adamx" is not known; did you mean "adam'
    )

    # Files and values are checked together, and --validate shows even what the file cannot say with them.
    path.write_text(
        text.replace(str(dataset_file), "absent.jsonl").replace("limit: 4", "limit: four\n  ppl: 1")
    )
    expected = [
        f'{path}:3:10: student.model: "/absent/model" ',
        f'{path}:9:11: data.train[0].path: "absent.jsonl" does not exist on the trainer\'s host',
        f"{path}:13:13: optimizer.maxSteps: 0 ",
        f'{path}:17:10: evaluation.limit: expects a whole number; "four" is text.',
        f'{path}:18:3: evaluation.ppl: there is no such field; "evaluation.metrics" is its name here',
    ]
    result = command(target, "run", "create", str(path), "--validate")
    assert result.exit_code == 2
    problems = result.stderr.splitlines()
    assert [each.startswith(start) for each, start in zip(problems, expected, strict=True)] == [True] * 5
    assert len(command("127.0.0.1:1", "run", "create", str(path), "--validate").stderr.splitlines()) == 2
    assert command(target, "run", "list").stdout == "There are no runs yet.\n"


def test_a_failed_run_says_why_and_what_to_do(
    trainer_service: Callable[..., Program],
    hf_teacher: Program,
    models: Models,
    dataset_file: Path,
    tmp_path: Path,
) -> None:
    target = trainer_service().target
    path = run_file(tmp_path, models, hf_teacher.target, str(dataset_file), model=str(models.foreign))
    watched = command(target, "run", "create", str(path), "--watch")
    assert watched.exit_code == 1, watched.output
    shown = command(target, "run", "show", "latest")
    assert shown.exit_code == 0
    names, words = zip(*(line.split(maxsplit=1) for line in shown.stdout.splitlines()[:5]), strict=True)
    assert names == ("state", "reason", "why", "next", "run")
    assert words[:2] == ("FAILED", "TOKENIZER_MISMATCH")
    assert "`stillhouse run logs " in words[3]
    assert words[2] not in words[3]
    told = json.loads(command(target, "run", "show", "latest", "--json").stdout)
    assert told["error"]["reason"] == "TOKENIZER_MISMATCH"
    assert told["error"]["message"] in watched.stdout


def test_pushing_and_creating_twice_changes_nothing(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    target = trainer_service().target
    names = [command(target, "data", "push", str(dataset_file)).stdout.strip() for _ in range(2)]
    assert names[0] == names[1]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(dataset_file.read_text() + '{"prompt": "Ada has"}\n')
    refused = command(target, "data", "push", str(bad))
    assert refused.exit_code == 2
    assert f"bad.jsonl, row {bad.read_text().count(chr(10))}, field completion: is missing" in refused.stderr
    bad.write_text('{"text": "Ada", "txet": "Ben"}\n')
    assert (
        "field txet: is no field of a row"
        in command(target, "data", "push", "--extra-fields", "refuse", str(bad)).stderr
    )
    path = run_file(tmp_path, models, "127.0.0.1:1", names[0])
    request = ("--request-id", "0b5b7a52-64b6-4a3c-9a77-1c1a4a4a7d10", "--json")
    made = [json.loads(command(target, "run", "create", str(path), *request).stdout)["id"] for _ in range(2)]
    assert made[0] == made[1]
    other = command(target, "run", "create", str(path), *request, "--set", "optimizer.seed=5")
    assert other.exit_code == 5
    assert json.loads(other.stderr)["error"]["reason"] == "REQUEST_CONFLICT"
    with Trainer(target) as trainer:
        handle = trainer.run(made[0][:6])
        assert handle.stop().state in {Run.STATE_STOPPED, Run.STATE_STOPPING}
        assert handle.wait().state == Run.STATE_STOPPED
    assert command(target, "run", "watch", made[0]).exit_code == 5


def test_python_takes_messages_mappings_and_files(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    path = run_file(tmp_path, models, "127.0.0.1:1", str(dataset_file))
    mapping = yaml.safe_load(path.read_text())
    with Trainer(trainer_service().target) as trainer:
        from_file = trainer.validate(path, overrides=["loss.top_k=3"]).effective_spec
        from_mapping = trainer.validate(mapping, overrides=["loss.top_k=3"]).effective_spec
        spec = trainer.validate(path).spec
        from_message = trainer.validate(spec, overrides=["loss.top_k=3"]).effective_spec
        assert from_file == from_mapping == from_message
        assert from_file.loss.top_k == 3
        with pytest.raises(StillhouseError, match=r'^student\.model: "/absent" ') as caught:
            trainer.create_run(mapping | {"student": {"model": "/absent"}})
        assert caught.value.reason is Reason.INVALID_SPEC
        assert list(trainer.runs()) == []
