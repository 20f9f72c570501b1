"""Conformance of a served classifier over gRPC: its classes against transformers in float64, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.classes import decode_classes
from stillhouse.protos.tensors.distributions import encode
from tests.support.programs import start_teacher
from tests.support.small_models import make_encoder, make_wordpiece
from tests.teacher_service.calls import Teacher

pytestmark = pytest.mark.model

NAMES = ("yes", "no", "perhaps")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifier")
    words = make_wordpiece(["the tea was fine", "is the train late"], root / "tokenizer", 100, max_tokens=48)
    return make_encoder(
        root / "model",
        tokenizer_dir=words,
        class_names=NAMES,
        hidden_size=64,  # vLLM's CPU build has heads of 32 units and more
        seed=1,
        initializer_range=0.3,
    )


ON_VLLM = (
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
)


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=ON_VLLM)])
def classifier(
    request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Teacher]:
    directory = tmp_path_factory.mktemp("service")
    options = ["--threads", "1", "--dtype", "float32"]
    with start_teacher(model_dir, engine=request.param, directory=directory, options=options) as program:
        teacher = Teacher(program.target)
        yield teacher
        teacher.close()


def ask(
    teacher: Teacher,
    ids: list[int],
    config: teacher_pb2.DistributionConfig | None = None,
    **fields: Any,
) -> np.ndarray:
    """Log-probabilities of one sequence; raises its error."""
    sequence = teacher_pb2.ScoreSequence(token_ids=encode(np.array(ids, np.int32)), **fields)
    requests = [
        teacher_pb2.ScoreRequest(config=config or teacher_pb2.DistributionConfig(classes=True)),
        teacher_pb2.ScoreRequest(sequence=sequence),
    ]
    (response,) = list(teacher.stub.Score(iter(requests)))
    (result,) = response.results
    assert result.last
    if result.HasField("error"):
        raise from_status(result.error)
    row = decode_classes([result.classes], num_classes=len(NAMES), num_tokens=len(ids))
    logprobs: np.ndarray = row.logprobs[0]
    return logprobs


def reference(model_dir: Path, ids: list[int], types: list[int] | None = None) -> np.ndarray:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(model_dir).double().eval()
    options = {} if types is None else {"token_type_ids": torch.tensor([types])}
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([ids]), **options).logits[0].log_softmax(-1).numpy()
    return found


def test_info_names_classes_and_types(classifier: Teacher) -> None:
    info = classifier.info
    assert tuple(info.class_names) == NAMES
    assert (info.num_classes, info.num_token_types, info.max_sequence_tokens) == (3, 2, 48)
    with_states = info.engine.startswith("hf ")
    wanted = [teacher_pb2.CAPABILITY_CLASSES, *([teacher_pb2.CAPABILITY_LAYER_STATES] if with_states else [])]
    assert list(info.capabilities) == wanted
    assert (info.num_layers, info.hidden_size) == ((2, 64) if with_states else (0, 0))


@pytest.mark.parametrize("length", [2, 7, 48])
def test_classes_are_those_of_a_float64_forward(classifier: Teacher, model_dir: Path, length: int) -> None:
    ids = np.random.default_rng(length).integers(5, 20, length).tolist()
    np.testing.assert_allclose(ask(classifier, ids), reference(model_dir, ids), atol=1e-5)
    types = [0] * (length // 2) + [1] * (length - length // 2)
    paired = ask(classifier, ids, token_type_ids=encode(np.array(types, np.int32)))
    np.testing.assert_allclose(paired, reference(model_dir, ids, types), atol=1e-5)
    assert np.abs(paired - ask(classifier, ids)).max() > 1e-4


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"start": 1}, Reason.INVALID_REQUEST),
        ({"token_type_ids": encode(np.array([0, 2, 0], np.int32))}, Reason.INVALID_REQUEST),
        ({"token_type_ids": encode(np.array([0, 1], np.int32))}, Reason.TENSOR_INVALID),
        ({"adapter": "none"}, Reason.ADAPTER_NOT_FOUND),
    ],
)
def test_sequences_that_are_none_of_a_classifier_are_refused(
    classifier: Teacher, fields: dict[str, Any], reason: Reason
) -> None:
    with pytest.raises(StillhouseError) as caught:
        ask(classifier, [2, 7, 3], **fields)
    assert caught.value.reason is reason


def test_too_long_and_unknown_tokens_are_refused(classifier: Teacher) -> None:
    for ids, reason in (([5] * 49, Reason.SEQUENCE_TOO_LONG), ([5, 10_000], Reason.TOKEN_OUT_OF_RANGE)):
        with pytest.raises(StillhouseError) as caught:
            ask(classifier, ids)
        assert caught.value.reason is reason


def test_requests_of_text_are_refused_by_name(classifier: Teacher) -> None:
    with pytest.raises(StillhouseError, match="is a classifier"):
        classifier.score_one(np.array([5, 6, 7]), top_k=1)
    with pytest.raises(StillhouseError, match="is a classifier"):
        classifier.generate([teacher_pb2.Prompt(text="the tea")])
    both = teacher_pb2.DistributionConfig(classes=True, top_k=3)
    call = classifier.stub.Score(iter([teacher_pb2.ScoreRequest(config=both)]))
    with pytest.raises(grpc.RpcError, match="top_k is requested too"):
        list(call)
    words = r"Give ascending numbers in \[0, 2\]" if classifier.info.num_layers else "has no layer_states"
    for layers in ([3], [1, 1], [-1]):
        asked = teacher_pb2.DistributionConfig(classes=True, hidden_layers=layers)
        call = classifier.stub.Score(iter([teacher_pb2.ScoreRequest(config=asked)]))
        with pytest.raises(grpc.RpcError, match=words):
            list(call)
