"""Conformance of engines with adapters, over gRPC, against peft: one suite for hf and vllm."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from tests.conftest import Models
from tests.teacher_service.calls import (
    Teacher,
    assert_agrees,
    distribution_config,
    prompt,
    random_ids,
    reference_logprobs,
    refusal,
    sequence,
)

pytestmark = pytest.mark.model


def test_adapters_match_peft_also_in_mixed_batches(teacher: Teacher, models: Models) -> None:
    stub, ids = teacher.stub, random_ids(24, seed=8)
    names = {"mix-a/1": models.adapter_a, "mix-b/1.5": models.adapter_b}
    try:
        for name, path in names.items():
            loaded = stub.LoadAdapter(teacher_pb2.LoadAdapterRequest(adapter=name, path=str(path)))
            again = stub.LoadAdapter(teacher_pb2.LoadAdapterRequest(adapter=name, path=str(path)))
            assert loaded == again
        references = {"": reference_logprobs(models.teacher, ids)}
        references |= {name: reference_logprobs(models.teacher, ids, path) for name, path in names.items()}
        order = ["", "mix-a/1", "", "mix-b/1.5", "mix-a/1", "", "mix-b/1.5", ""]
        answers = teacher.score([sequence(ids, adapter=name) for name in order])
        for index, name in enumerate(order):
            answer = answers[index]
            assert not isinstance(answer, StillhouseError)
            assert_agrees(answer, ids, references[name], top_k=20)
        samples = teacher.generate(
            [prompt(ids, adapter="mix-a/1"), prompt(ids)],
            config=distribution_config(),
            seed=1,
            max_new_tokens=8,
        )
        whole = np.concatenate([ids, np.array(samples[0, 0].ids, np.int32)])
        spoken = reference_logprobs(models.teacher, whole, models.adapter_a)
        assert_agrees(samples[0, 0].distributions, whole, spoken, top_k=20)
        info = stub.GetTeacherInfo(teacher_pb2.GetTeacherInfoRequest())
        prints = {adapter.name: adapter.fingerprint for adapter in info.adapters}
        assert set(prints) == set(names)
        assert samples[0, 0].adapter_fingerprint == prints["mix-a/1"]
        assert samples[1, 0].adapter_fingerprint == ""
    finally:
        for name in names:
            stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(adapter=name))
    base = teacher.score_one(ids)
    assert_agrees(base, ids, references[""], top_k=20)


def test_a_name_never_changes_its_weights(teacher: Teacher, models: Models) -> None:
    def load(path: Path) -> teacher_pb2.LoadAdapterResponse:
        return teacher.stub.LoadAdapter(teacher_pb2.LoadAdapterRequest(adapter="fixed/1", path=str(path)))

    load(models.adapter_a)
    for _ in range(2):  # while loaded, and after unloading
        assert refusal(teacher, lambda: load(models.adapter_b)).reason == Reason.ADAPTER_CONFLICT
        if any(
            each.name == "fixed/1"
            for each in teacher.stub.GetTeacherInfo(teacher_pb2.GetTeacherInfoRequest()).adapters
        ):
            teacher.stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(adapter="fixed/1"))
    load(models.adapter_a)
    teacher.stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(adapter="fixed/1"))
    answer = teacher.score([sequence([1, 2, 3], adapter="fixed/1")])[0]
    assert isinstance(answer, StillhouseError)
    assert answer.reason == Reason.ADAPTER_NOT_FOUND


def test_a_malformed_adapter_is_refused_and_the_teacher_continues(
    teacher: Teacher, models: Models, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    misfit = tmp_path / "misfit"
    misfit.mkdir()
    config = json.loads((models.adapter_a / "adapter_config.json").read_text())
    (misfit / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    (misfit / "adapter_model.safetensors").write_bytes(
        (models.adapter_a / "adapter_model.safetensors").read_bytes()
    )
    wanted = [
        ("x", str(tmp_path), Reason.ADAPTER_INVALID),
        ("x", str(tmp_path / "nowhere"), Reason.ADAPTER_INVALID),
        ("x", str(broken), Reason.ADAPTER_INVALID),
        ("x", str(misfit), Reason.ADAPTER_INVALID),
        ("x", "a\0b", Reason.ADAPTER_INVALID),
        ("../x", str(models.adapter_a), Reason.INVALID_REQUEST),
        ("", str(models.adapter_a), Reason.INVALID_REQUEST),
        ("a b", str(models.adapter_a), Reason.INVALID_REQUEST),
        ("x" * 200, str(models.adapter_a), Reason.INVALID_REQUEST),
    ]
    for name, path, reason in wanted:
        request = teacher_pb2.LoadAdapterRequest(adapter=name, path=path)
        error = refusal(teacher, partial(teacher.stub.LoadAdapter, request))
        assert error.reason == reason, (name, path, error.message)
    ids = random_ids(12)
    assert_agrees(teacher.score_one(ids), ids, reference_logprobs(models.teacher, ids), top_k=20)


def test_unknown_adapters_cannot_be_unloaded_and_empty_uploads_are_refused(teacher: Teacher) -> None:
    unknown = refusal(
        teacher, lambda: teacher.stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(adapter="nobody"))
    )
    assert unknown.reason == Reason.ADAPTER_NOT_FOUND
    upload = refusal(teacher, lambda: teacher.stub.UploadAdapter(iter([teacher_pb2.UploadAdapterRequest()])))
    assert upload.reason == Reason.ADAPTER_INVALID
