"""The engine on an API that only chats: text with few candidates, limits as they are, and no scores."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.conversation import Turns
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.student_trainer.train.teacher.identity import require_kind
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, GenerateInput
from stillhouse.teacher_service.engines.openai.chat_server import ChatServer
from stillhouse.teacher_service.engines.openai.dialect import ServedModel
from stillhouse.teacher_service.engines.openai.engine import OpenAiEngine
from stillhouse.teacher_service.models.tokenizer import TextCodec
from stillhouse.teacher_service.rpc.score_validation import require_scores
from tests.conftest import Models
from tests.support.networks.chat_server import chat_server
from tests.teacher_service.calls import assert_agrees, reference_logprobs

pytestmark = pytest.mark.model

TURNS = Turns(messages=({"role": "user", "content": "Which house?"},))


@asynccontextmanager
async def engine_on(url: str, models: Models, **fields: Any) -> AsyncIterator[OpenAiEngine]:
    fields = {"tokenizer": str(models.teacher), "max_sequence_tokens": 256, **fields}
    engine = await OpenAiEngine.load(TeacherConfig(engine="openai", upstream=url, **fields))
    try:
        yield engine
    finally:
        await engine.close()


def asked(models: Models, **fields: Any) -> GenerateInput:
    ids = TextCodec.load(str(models.teacher)).render(TURNS)
    return GenerateInput(token_ids=ids, turns=TURNS, max_new_tokens=8, **fields)


@pytest.mark.parametrize(("most", "limit_field"), [(20, "max_tokens"), (5, "max_completion_tokens")])
async def test_samples_carry_as_many_candidates_as_the_api_gives(
    models: Models, most: int, limit_field: str
) -> None:
    with chat_server(models.teacher, most=most, limit_field=limit_field) as server:
        async with engine_on(server.url, models) as engine:
            info = engine.info
            assert (info.model, info.max_top_k, info.max_sequence_tokens) == ("hosted-1", most, 256)
            assert info.engine == "openai (server, chat only)"
            assert info.capabilities == {teacher_pb2.CAPABILITY_GENERATION_ONLY}
            for temperature in (0.0, 1.0, 0.7):
                item = asked(models, temperature=temperature, options=DistributionOptions(top_k=most), seed=5)
                chunks = [chunk async for chunk in engine.generate(item)]
                assert len(chunks) == 1
                rows, ids = chunks[0].distributions, chunks[0].token_ids
                assert rows is not None
                whole = np.concatenate([item.token_ids, ids])
                # The API's model has no padding behind its vocabulary.
                reference = reference_logprobs(models.teacher, whole)[:, :384]
                reference -= np.log(np.exp(reference).sum(axis=1, keepdims=True))
                assert_agrees(rows, whole, reference, top_k=most)


async def test_what_it_does_not_give_is_refused_with_the_remedy(models: Models) -> None:
    with chat_server(models.teacher, most=None) as server:
        async with engine_on(server.url, models) as engine:
            assert engine.info.max_top_k == 0
            chunk = await anext(aiter(engine.generate(asked(models, temperature=0.0))))
            codec = TextCodec.load(str(models.teacher))
            assert len(chunk.token_ids)
            assert chunk.distributions is None
            assert len(codec.encode_completion("Which house?")) == len(codec.encode("Which house?"))
            for item, part in (
                (asked(models, options=DistributionOptions(top_k=0)), "text without distributions"),
                (GenerateInput(token_ids=chunk.token_ids), "Send a conversation"),
                (asked(models, top_k=5), "Leave it out"),
            ):
                with pytest.raises(StillhouseError, match=part):
                    await anext(aiter(engine.generate(item)))
            with pytest.raises(StillhouseError, match="--capture") as caught:
                require_scores(engine.info)
            assert caught.value.reason is Reason.CAPABILITY
            described = teacher_pb2.GetTeacherInfoResponse(
                model="m", capabilities=[teacher_pb2.CAPABILITY_GENERATION_ONLY]
            )
            with pytest.raises(StillhouseError, match="generates and does not score"):
                require_kind(described, "host:1", classes=False)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"finish_reason": "content_filter"}, "content_filter"),
        ({"finish_reason": ["stop"]}, "instead of text"),
        ({"message": {"content": None}}, "instead of text"),
        ({"message": {"content": "a", "tool_calls": [{}]}}, "without a parser"),
        ({"logprobs": {"content": [{"bytes": [300], "logprob": -1}]}}, "not bytes"),
        ({"logprobs": {"content": [{"token": None, "logprob": -1}]}}, "neither"),
        ({"logprobs": {"content": [{"token": "~~never~~", "logprob": -1}]}}, "does not have"),
        ({"logprobs": {"content": [{"token": "a", "logprob": -9999.0}]}}, "does not tell"),
        ({"logprobs": {"content": [{"token": "a", "logprob": 1e999}]}}, "NaN, infinite"),
        ({"logprobs": {"content": [{}] * 9}}, "at most 8"),
        ({"logprobs": {"content": []}}, "names no tokens"),
        ({"logprobs": None}, "another form"),
    ],
)
def test_each_value_is_checked(models: Models, change: dict[str, Any], part: str) -> None:
    codec = TextCodec.load(str(models.teacher))
    model = ServedModel(
        name="m", vocab_size=392, tokenizer_size=384, max_sequence_tokens=256, eos_token_ids=(0,)
    )
    dialect = ChatServer(model, codec, None).with_tokens()
    entry: dict[str, Any] = {"token": "a", "bytes": None, "logprob": -1.0, "top_logprobs": []}
    choice: dict[str, Any] = {
        "finish_reason": "length",
        "message": {"content": "a"},
        "logprobs": {"content": [entry]},
    }
    item = asked(models, options=DistributionOptions(top_k=0))
    piece = dialect.read_piece(item, 0, {"choices": [choice]}, 9)
    assert piece.token_ids.tolist() == codec.encode("a").tolist()
    assert piece.logprobs.tolist() == [-1.0]
    with pytest.raises(StillhouseError, match=part):
        dialect.read_piece(item, 0, {"choices": [{**choice, **change}]}, 9)
