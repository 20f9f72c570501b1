"""The engine on SGLang's protocol, against transformers, and on servers that answer wrongly; no real SGLang is run."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, GeneratedChunk, GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.openai.dialect import ServedModel
from stillhouse.teacher_service.engines.openai.engine import OpenAiEngine
from stillhouse.teacher_service.engines.openai.sglang_server import SglangServer
from tests.conftest import Models
from tests.support.networks.http_server import HttpServer, Received, Reply
from tests.support.networks.sglang_server import sglang_server
from tests.teacher_service.calls import assert_agrees, random_ids, reference_logprobs

pytestmark = pytest.mark.model

IDS = random_ids(8)
TOP_64 = DistributionOptions(top_k=64)


@pytest.fixture(scope="module")
def server(models: Models) -> Iterator[HttpServer]:
    with sglang_server(models.teacher, adapter=models.adapter_a) as running:
        yield running


@asynccontextmanager
async def engine_on(url: str, tokenizer: Path, **fields: Any) -> AsyncIterator[OpenAiEngine]:
    engine = await OpenAiEngine.load(
        TeacherConfig(engine="openai", upstream=url, tokenizer=str(tokenizer), **fields)
    )
    try:
        yield engine
    finally:
        await engine.close()


async def sample(engine: OpenAiEngine, item: GenerateInput) -> GeneratedChunk:
    chunks = [chunk async for chunk in engine.generate(item)]
    assert len(chunks) == 1
    return chunks[0]


@pytest.mark.parametrize("flat", [True, False])
async def test_scores_and_samples_are_those_of_the_model(models: Models, flat: bool) -> None:
    ids = random_ids(40)
    with sglang_server(models.teacher, adapter=models.adapter_a, flat=flat) as running:
        async with engine_on(running.url, models.teacher) as engine:
            info = engine.info
            assert (info.vocab_size, info.tokenizer_size, info.max_top_k) == (392, 384, 256)
            assert (info.max_sequence_tokens, info.max_query_tokens, info.capabilities) == (
                505,
                0,
                frozenset(),
            )
            assert info.engine == "openai (sglang 0.5.23, seeds not kept)"
            for adapter, path in (("", None), ("style", models.adapter_a)):
                item = ScoreInput(token_ids=ids, start=9, adapter=adapter, options=TOP_64)
                reference = reference_logprobs(models.teacher, ids, path)
                assert_agrees(await engine.score(item), ids, reference, top_k=64)
            for temperature in (0.0, 0.7, 1.0):
                chunk = await sample(
                    engine,
                    GenerateInput(
                        token_ids=ids, temperature=temperature, max_new_tokens=6, seed=3, options=TOP_64
                    ),
                )
                whole = np.concatenate([ids, chunk.token_ids])
                reference = reference_logprobs(models.teacher, whole)
                assert chunk.distributions is not None
                assert_agrees(chunk.distributions, whole, reference, top_k=64)
                if temperature:
                    drawn = reference[39:-1] / temperature
                    drawn -= np.log(np.exp(drawn).sum(axis=1, keepdims=True))
                    wanted = np.take_along_axis(drawn, chunk.token_ids[:, None].astype(np.int64), axis=1)[
                        :, 0
                    ]
                    assert np.abs(chunk.sampling_logprobs - wanted).max() < 1e-4
    sent = running.requests[-1].body["sampling_params"]
    assert (sent["temperature"], sent["max_new_tokens"]) == (1.0, 6)
    assert "sampling_seed" not in sent, "the probe has found that seeds change nothing"


async def test_flat_rows_have_683_bytes_a_token(server: HttpServer, models: Models) -> None:
    answer, sizes = server.answer, []

    def measured(request: Received) -> Reply:
        reply = answer(request)
        sizes.append(len(json.dumps(reply.body)))
        return reply

    async with engine_on(server.url, models.teacher) as engine:
        server.answer = measured
        try:
            item = ScoreInput(token_ids=random_ids(505), start=1, options=TOP_64)
            await engine.score(item)
        finally:
            server.answer = answer
    assert sizes[0] / 504 < 683 + 40  # 40 of the token itself


async def test_the_upstreams_fields_have_remedies_where_it_lacks_them(
    server: HttpServer, models: Models
) -> None:
    ids = random_ids(8)
    async with engine_on(server.url, models.teacher, max_top_k=32) as engine:
        assert engine.info.max_top_k == 32
        for options in (
            DistributionOptions(top_k=1, temperatures=(2.0,)),
            DistributionOptions(top_k=1, num_sampled_tokens=3),
        ):
            with pytest.raises(StillhouseError, match="--engine hf") as caught:
                await engine.score(ScoreInput(token_ids=ids, start=1, options=options))
            assert caught.value.reason is Reason.CAPABILITY
        with pytest.raises(StillhouseError, match="Load it there"):
            await engine.load_adapter("x", Path())


Edit = Callable[[dict[str, Any]], None]


def _with_array(name: str, change: Callable[[Any], Any], dtype: str) -> Edit:
    def edit(meta: dict[str, Any]) -> None:
        field = f"input_top_logprobs_{name}_flat_b64"
        array = (
            np.frombuffer(base64.b64decode(meta[field]), dtype)
            .copy()
            .reshape(meta["input_top_logprobs_shape"])
        )
        meta[field] = base64.b64encode(change(array).tobytes()).decode()

    return edit


def _put(row: int, column: int, value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[row, column] = value
        return array

    return change


def _set(name: str, value: Any) -> Edit:
    return lambda meta: meta.update({name: value})


def _entry(index: int, value: Any) -> Edit:
    def edit(meta: dict[str, Any]) -> None:
        meta["input_token_logprobs"][index] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "reason", "part"),
    [
        (_with_array("val", _put(2, 0, np.nan), "<f4"), Reason.NON_FINITE, "position 3"),
        (_with_array("val", _put(2, 1, -np.inf), "<f4"), Reason.NON_FINITE, "position 3"),
        (_with_array("val", _put(0, 0, 0.5), "<f4"), Reason.TENSOR_INVALID, "above 0"),
        (_with_array("val", lambda array: array * 0, "<f4"), Reason.TENSOR_INVALID, "sum to more than 1"),
        (_with_array("idx", _put(0, 1, 392), "<i4"), Reason.TENSOR_INVALID, "config.json"),
        (_with_array("idx", _put(0, 1, -1), "<i4"), Reason.TENSOR_INVALID, "fewer than the 4"),
        (_with_array("idx", lambda array: array * 0, "<i4"), Reason.TENSOR_INVALID, "twice"),
        (_with_array("val", lambda array: array[:-1], "<f4"), Reason.TENSOR_INVALID, "bytes"),
        (_set("input_top_logprobs_val_flat_b64", "*"), Reason.TENSOR_INVALID, "not base64"),
        (_set("input_top_logprobs_val_flat_b64", 7), Reason.TENSOR_INVALID, "not base64"),
        (_set("input_top_logprobs_shape", [10**12, 4]), Reason.TENSOR_INVALID, "shape"),
        (_set("input_top_logprobs_null_prefix", 0), Reason.TENSOR_INVALID, "shape"),
        (_set("input_top_logprobs_val_flat_b64_dtype", "float64"), Reason.TENSOR_INVALID, "types"),
        (_set("input_token_logprobs", []), Reason.TENSOR_INVALID, "log-probabilities for 8 tokens"),
        (_set("input_token_logprobs", [[]] * 9), Reason.TENSOR_INVALID, "at most 8"),
        (_set("input_token_logprobs", None), Reason.TENSOR_INVALID, "no list"),
        (_entry(3, [-1.0, 5, None]), Reason.TENSOR_INVALID, "other tokens"),
        (_entry(3, [-1.0]), Reason.TENSOR_INVALID, "without"),
        (_entry(3, ["-1", 5]), Reason.TENSOR_INVALID, "not a number"),
        (_entry(3, [True, 5]), Reason.TENSOR_INVALID, "not a number"),
        (_entry(3, [-1.0, 2**40]), Reason.TENSOR_INVALID, "not a token id"),
        (_entry(3, [10**400, int(IDS[3]), None]), Reason.NON_FINITE, "position 3"),
    ],
)
def test_each_value_is_checked(
    server: HttpServer, models: Models, edit: Edit, reason: Reason, part: str
) -> None:
    item = ScoreInput(token_ids=IDS, start=1, options=DistributionOptions(top_k=4))
    model = ServedModel(
        name="m", vocab_size=392, tokenizer_size=384, max_sequence_tokens=505, eos_token_ids=(0,)
    )
    dialect = SglangServer(model)
    request = dialect.score_request(item, 4)
    answer = server.answer(Received(method="POST", path=request.path, headers={}, body=request.body)).body
    assert_agrees(dialect.read_scores(item, 4, answer), IDS, reference_logprobs(models.teacher, IDS), top_k=4)
    edit(answer["meta_info"])
    with pytest.raises(StillhouseError, match=part) as caught:
        dialect.read_scores(item, 4, answer)
    assert caught.value.reason is reason


def test_an_end_in_another_form_is_refused() -> None:
    model = ServedModel(name="m", vocab_size=9, tokenizer_size=9, max_sequence_tokens=99, eos_token_ids=(0,))
    answer = {"meta_info": {"finish_reason": {"type": ["stop"]}, "output_token_logprobs": []}}
    with pytest.raises(StillhouseError, match="before its end"):
        SglangServer(model).read_piece(GenerateInput(token_ids=IDS), 0, answer, 8)


def _shifted(reply: Reply) -> Reply:
    """Log-probabilities of another base."""
    meta = reply.body.get("meta_info", {})
    for name in [each for each in meta if each.endswith("val_flat_b64")]:
        array = np.frombuffer(base64.b64decode(meta[name]), "<f4") - 3
        meta[name] = base64.b64encode(array.tobytes()).decode()
    return reply


def _another_text(reply: Reply) -> Reply:
    """Samples whose log-probabilities are of other tokens."""
    for entry in reply.body.get("meta_info", {}).get("output_token_logprobs", []):
        entry[0] -= 2
    return reply


@pytest.mark.parametrize(
    ("change", "part"), [(_shifted, "not normalised"), (_another_text, "other log-probabilities")]
)
async def test_the_probe_refuses_numbers_that_are_not_the_models(
    server: HttpServer, models: Models, change: Callable[[Reply], Reply], part: str
) -> None:
    answer = server.answer
    server.answer = lambda request: change(answer(request))
    try:
        with pytest.raises(StillhouseError, match=part) as caught:
            async with engine_on(server.url, models.teacher):
                pass
    finally:
        server.answer = answer
    assert caught.value.reason is Reason.INVALID_CONFIG


async def test_another_tokenizer_or_model_name_is_refused(server: HttpServer, models: Models) -> None:
    for tokenizer, model, part in (
        (models.foreign, "", "--tokenizer is not"),
        (models.teacher, "other", "lists .*teacher"),
        (models.teacher.parent / "none", "", "no directory"),
    ):
        with pytest.raises(StillhouseError, match=part):
            async with engine_on(server.url, tokenizer, model=model):
                pass


@pytest.mark.parametrize("away", [True, False])
async def test_a_changed_model_is_noticed(server: HttpServer, models: Models, away: bool) -> None:
    from stillhouse.teacher_service.engines.openai import engine as module

    answer = server.answer
    async with engine_on(server.url, models.teacher, upstream_timeout_s=1.0) as engine:

        async def check() -> None:
            engine._checked_at_s -= module.CHECK_INTERVAL_S
            await engine.check()

        try:
            await check()
            server.answer = lambda request: Reply(status=404)
            await check()  # unreachable, and the teacher stays
            server.answer = answer
            await check()
            if away:
                server.answer = lambda request: Reply(status=404)
                await check()
            server.answer = lambda request: _moved(answer(request))
            with pytest.raises(StillhouseError, match="other log-probabilities than before") as caught:
                await check()
        finally:
            server.answer = answer
    assert caught.value.reason is Reason.TEACHER_CHANGED


def _moved(reply: Reply) -> Reply:
    for entry in reply.body.get("meta_info", {}).get("input_token_logprobs", []):
        if entry[0] is not None:
            entry[0] -= 1
    return replace(reply)
