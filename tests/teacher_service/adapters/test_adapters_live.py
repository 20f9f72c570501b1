"""Adapters loaded and unloaded while streams run, uploaded or from a directory, with the distributions of peft; for
hf and vllm."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error
from stillhouse.protos.files.adapter import upload_requests
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.distributions import decode_distributions
from tests.conftest import Models
from tests.support.small_models import make_adapter
from tests.teacher_service.calls import (
    Teacher,
    assert_agrees,
    distribution_config,
    prompt,
    random_ids,
    reference_logprobs,
    sequence,
)

pytestmark = pytest.mark.model


@pytest.fixture(params=["hf_teacher", "vllm_teacher"])
def teacher(request: pytest.FixtureRequest) -> Iterator[Teacher]:
    client = Teacher(request.getfixturevalue(request.param).target)
    yield client
    client.close()


def upload(teacher: Teacher, directory: Path) -> teacher_pb2.UploadAdapterResponse:
    answer: teacher_pb2.UploadAdapterResponse = teacher.stub.UploadAdapter(upload_requests(directory))
    return answer


def test_adapters_load_and_unload_while_others_score(teacher: Teacher, models: Models) -> None:
    ids = random_ids(40, seed=3)
    wanted = {
        "": reference_logprobs(models.teacher, ids),
        "live-a": reference_logprobs(models.teacher, ids, models.adapter_a),
    }
    ending, answers, wrong = threading.Event(), [0], list[Any]()
    room = threading.Semaphore(6)  # few in flight, so that the stream is live and ends soon

    def requests() -> Iterator[teacher_pb2.ScoreRequest]:
        yield teacher_pb2.ScoreRequest(config=distribution_config(8))
        number = 0
        while not ending.is_set():
            if not room.acquire(timeout=0.1):
                continue
            one = sequence(ids, adapter=("", "live-a")[number % 2])
            one.sequence_id = number
            number += 1
            yield teacher_pb2.ScoreRequest(sequence=one)

    def stream() -> None:
        for response in teacher.stub.Score(requests()):
            for result in response.results:
                room.release()
                try:
                    assert not result.HasField("error"), result.error.message
                    rows = decode_distributions(
                        result.distributions, vocab_size=teacher.info.vocab_size, max_rows=512, max_top_k=8
                    )
                    assert_agrees(rows, ids, wanted[("", "live-a")[result.sequence_id % 2]], top_k=8)
                    answers[0] += 1
                except AssertionError as error:
                    wrong.append(error)

    teacher.load_adapter("live-a", models.adapter_a)
    running = threading.Thread(target=stream)
    running.start()
    try:
        path = upload(teacher, models.adapter_b).path
        whole = reference_logprobs(models.teacher, ids, models.adapter_b)
        for number in range(3):
            before = answers[0]
            teacher.load_adapter(f"live-b/{number}", path)
            assert_agrees(teacher.score_one(ids, adapter=f"live-b/{number}", top_k=8), ids, whole, top_k=8)
            teacher.unload_adapter(f"live-b/{number}")
            assert answers[0] > before or number == 0
    finally:
        ending.set()
        running.join(60)
        teacher.unload_adapter("live-a")
    assert not wrong, wrong[0]
    assert answers[0] > 10


def test_every_slot_is_used_and_the_next_adapter_is_refused(
    teacher: Teacher, models: Models, tmp_path: Path
) -> None:
    """Full slots would expose a kernel that applies the last slot to base requests."""
    ids = random_ids(24, seed=5)
    slots = teacher.info.max_adapters
    made = [
        make_adapter(tmp_path / f"{seed}", models.teacher, rank=4, seed=100 + seed) for seed in range(slots)
    ]
    names = [f"slot/{seed}" for seed in range(slots)]
    try:
        for name, path in zip(names, made, strict=True):
            teacher.load_adapter(name, upload(teacher, path).path)
        with pytest.raises(grpc.RpcError) as caught:
            teacher.load_adapter("one-more", models.adapter_a)
        error = from_rpc_error(caught.value, target="", service="teacher")
        assert error.reason == Reason.ADAPTER_SLOTS
        assert f"{slots} adapter slots" in error.message
        order = [name for pair in zip(names, [""] * slots, strict=True) for name in pair]
        references = {"": reference_logprobs(models.teacher, ids)} | {
            name: reference_logprobs(models.teacher, ids, path)
            for name, path in zip(names, made, strict=True)
        }
        answers = teacher.score([sequence(ids, adapter=name) for name in order])
        for index, name in enumerate(order):
            answer = answers[index]
            assert not isinstance(answer, StillhouseError)
            assert_agrees(answer, ids, references[name], top_k=20)
        samples = teacher.generate(
            [prompt(ids, adapter=name) for name in order],
            config=distribution_config(8),
            temperature=0,
            max_new_tokens=5,
        )
        for index, name in enumerate(order):
            sample = samples[index, 0]
            text = np.concatenate([ids, np.array(sample.ids, np.int32)])
            directory = made[names.index(name)] if name else None
            assert_agrees(
                sample.distributions, text, reference_logprobs(models.teacher, text, directory), top_k=8
            )
    finally:
        for each in teacher.stub.GetTeacherInfo(teacher_pb2.GetTeacherInfoRequest()).adapters:
            if each.name.startswith("slot/"):
                teacher.unload_adapter(each.name)
