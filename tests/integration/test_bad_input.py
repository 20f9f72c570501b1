"""Bad input: one sentence with value, limit and remedy, the right code, no step trained, and `run show` says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from stillhouse.client.api import Reason, ScoreItem, StillhouseError, Teacher, Trainer
from stillhouse.protos.errors import from_status
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher
from tests.support.runs import Service, small_spec, write_run_file

INVALID, PRECONDITION, UNAVAILABLE = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAVAILABLE,
)


@pytest.fixture(scope="module")
def narrow_teacher(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A teacher that takes sequences of 16 tokens and sends 8 candidates at most."""
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher,
            engine="hf",
            directory=tmp_path_factory.mktemp("narrow"),
            options=["--dtype=float32", "--threads=1", "--max-sequence-tokens=16", "--max-top-k=8"],
            environment=mark,
        ) as program,
    ):
        yield program


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A spec that must be refused, before it is queued or before its first step."""

    spec: dict[str, Any]
    code: grpc.StatusCode
    reason: Reason
    says: tuple[str, ...]
    """Parts that the sentence must hold: the value, the limit, the remedy."""


@pytest.fixture
def good_spec(hf_teacher: Program, models: Models, dataset_file: Path) -> dict[str, Any]:
    return small_spec(student=models.student, train=dataset_file, teacher=hf_teacher.target)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optimiser": {"learning_rate": 1e-3}}, ("optimiser", "optimizer")),
        ({"loss": {"topk": 8}}, ("loss.topk", "top_k")),
        ({"loss": {"top_k": "many"}}, ("loss.top_k", "many")),
        ({"optimizer": {"learning_rate": -1}}, ("optimizer.learning_rate", "-1")),
        ({"loss": {"top_k": 512}}, ("loss.top_k", "512", "256")),
        ({"student": {}}, ("student.model",)),
        ({"teachers": [{}]}, ("teachers[0].targets",)),
        ({"loss": {"terms": [{"divergence": "foward_kl"}]}}, ("loss.terms[0].divergence", "forward_kl")),
    ],
)
def test_a_bad_field_is_named_with_its_path(
    *,
    change: dict[str, Any],
    says: tuple[str, ...],
    good_spec: dict[str, Any],
    service: Service,
    tmp_path: Path,
) -> None:
    file = write_run_file(tmp_path / "run.yaml", {**good_spec, **change})
    before = service.stillhouse("run", "list", "--json").stdout
    refused = service.stillhouse("run", "create", str(file), expect=2)
    for part in says:
        assert part in refused.stderr
    assert service.stillhouse("run", "list", "--json").stdout == before, "a refused run was queued"


def refusals(good: dict[str, Any], models: Models, narrow: Program, root: Path) -> dict[str, Refused]:
    """Every case in which a run is refused because of what it finds."""

    def changed(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        spec: dict[str, Any] = yaml.safe_load(yaml.safe_dump(good))
        change(spec)
        return spec

    bad_row = root / "bad-row.jsonl"
    bad_row.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"question": "what?"}) + "\n")
    no_model, no_data = str(root / "no-model"), str(root / "no-data.jsonl")
    return {
        "missing model": Refused(
            spec=changed(lambda spec: spec["student"].update(model=no_model)),
            code=INVALID,
            reason=Reason.INVALID_SPEC,
            says=("student.model", no_model),
        ),
        "missing dataset": Refused(
            spec=changed(lambda spec: spec["data"]["train"][0].update(path=no_data)),
            code=INVALID,
            reason=Reason.INVALID_SPEC,
            says=("data.train[0].path", no_data, "data push"),
        ),
        "row without its fields": Refused(
            spec=changed(lambda spec: spec["data"]["train"][0].update(path=str(bad_row))),
            code=INVALID,
            reason=Reason.DATASET_INVALID,
            says=(str(bad_row), "row 2", "text", "question"),
        ),
        "unreachable teacher": Refused(
            spec=changed(
                lambda spec: spec.update(teachers=[{"targets": ["127.0.0.1:9"]}], retry={"teacher_wait_s": 1})
            ),
            code=UNAVAILABLE,
            reason=Reason.TEACHER_UNREACHABLE,
            says=("127.0.0.1:9",),
        ),
        "foreign tokenizer": Refused(
            spec=changed(lambda spec: spec["student"].update(model=str(models.foreign))),
            code=PRECONDITION,
            reason=Reason.TOKENIZER_MISMATCH,
            says=("tokenizer",),
        ),
        "top_k above the teacher's": Refused(
            spec=changed(lambda spec: spec["teachers"][0].update(targets=[narrow.target])),
            code=INVALID,
            reason=Reason.TOP_K_TOO_LARGE,
            says=("top_k", "8", "--max-top-k"),
        ),
        "sequence longer than the teacher's": Refused(
            spec=changed(
                lambda spec: spec.update(
                    teachers=[{"targets": [narrow.target]}],
                    loss={"top_k": 4},
                    evaluation={"top_k": 4},
                )
            ),
            code=INVALID,
            reason=Reason.SEQUENCE_TOO_LONG,
            says=("16", "max_sequence_tokens"),
        ),
    }


@pytest.mark.faults(row=16)
def test_what_a_run_cannot_use_ends_it_before_the_first_step(
    *,
    good_spec: dict[str, Any],
    narrow_teacher: Program,
    models: Models,
    service: Service,
    trainer: Trainer,
    tmp_path: Path,
) -> None:
    cases = refusals(good_spec, models, narrow_teacher, tmp_path)
    failed = {}
    for name, case in cases.items():
        try:
            failed[name] = trainer.create_run(case.spec)
        except StillhouseError as error:
            check(name, case, error)
    for name, handle in failed.items():
        run = handle.wait()
        assert run.state == Run.STATE_FAILED, name
        assert run.progress.step == 0, name
        assert handle.metrics("train/loss").get("train/loss") is None, name
        failure = from_status(run.error)
        check(name, cases[name], failure)
        shown = service.stillhouse("run", "show", handle.id).stdout
        assert failure.message in shown, name
        assert cases[name].reason in service.stillhouse("run", "show", handle.id, "--json").stdout, name


def check(name: str, case: Refused, error: StillhouseError) -> None:
    """Code, reason and sentence are those of the case."""
    assert error.reason is case.reason, (name, error.message)
    assert error.code is case.code, (name, error.code)
    for part in case.says:
        assert part in error.message, (name, error.message)
    assert "Traceback" not in error.message


@pytest.mark.parametrize("engine", ["hf", "vllm"])
@pytest.mark.faults(row=19)
def test_each_bad_sequence_gets_its_own_error_and_the_others_their_answers(
    engine: str, request: pytest.FixtureRequest, models: Models
) -> None:
    program: Program = request.getfixturevalue(f"{engine}_teacher")
    with Teacher(program.target) as teacher:
        info = teacher.info()
        limit, size = info.max_sequence_tokens, info.tokenizer_size
        sequences = {
            "good": [5, 6, 7, 8],
            "too long": [5] * (limit + 1),
            "outside": [5, size, 7],
            "negative": [5, -1, 7],
            "empty": [],
            "good too": [9, 10, 11],
        }
        items = [ScoreItem(id=name, token_ids=np.array(ids, np.int32)) for name, ids in sequences.items()]
        answers = {answer.id: answer for answer in teacher.score(items, top_k=4)}
    assert answers.keys() == sequences.keys()
    expected = {
        "too long": (Reason.SEQUENCE_TOO_LONG, (str(limit + 1), str(limit))),
        "outside": (Reason.TOKEN_OUT_OF_RANGE, (str(size),)),
        "negative": (Reason.TOKEN_OUT_OF_RANGE, ("-1",)),
        "empty": (Reason.EMPTY_SEQUENCE, ("no tokens",)),
    }
    for name, answer in answers.items():
        if name not in expected:
            assert answer.error is None
            assert answer.distributions is not None
            continue
        reason, says = expected[name]
        assert answer.error is not None, name
        assert answer.error.reason is reason
        assert answer.error.code is INVALID
        for part in says:
            assert part in answer.error.message


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_top_k_above_the_limit_is_refused_with_the_limit(
    engine: str, request: pytest.FixtureRequest
) -> None:
    program: Program = request.getfixturevalue(f"{engine}_teacher")
    with Teacher(program.target) as teacher, pytest.raises(StillhouseError) as caught:
        list(teacher.score([("one", [5, 6, 7])], top_k=1000))
    assert caught.value.reason is Reason.TOP_K_TOO_LARGE
    assert caught.value.code is INVALID
    assert "1000" in caught.value.message
    assert "256" in caught.value.message
