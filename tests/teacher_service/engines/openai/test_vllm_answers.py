"""Answers of vLLM's server, as its protocol defines them, read and checked without a server."""

from __future__ import annotations

import base64
import copy
import io
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import DistributionOptions, GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.openai.calls import generate, score
from stillhouse.teacher_service.engines.openai.credentials import Upstream
from stillhouse.teacher_service.engines.openai.dialect import Piece, ServedModel
from stillhouse.teacher_service.engines.openai.http_client import HttpClient
from stillhouse.teacher_service.engines.openai.vllm_server import COMPLETIONS, TOKENS, VllmServer
from tests.support.networks.http_server import Reply, http_server
from tests.teacher_service.calls import assert_agrees

VOCAB, TOP_K = 12, 3
MODEL = ServedModel(
    name="m",
    vocab_size=VOCAB,
    tokenizer_size=10,
    max_sequence_tokens=8,
    eos_token_ids=(0,),
    adapters={"a": "upstream-a"},
)
LOGITS = np.random.default_rng(1).normal(scale=2, size=(8, VOCAB))
LOGPROBS = LOGITS - np.log(np.exp(LOGITS).sum(axis=1, keepdims=True))
IDS = np.array([5, 1, 7, 2, 9, 3, 4, 8], np.int32)
OPTIONS = DistributionOptions(top_k=TOP_K)


def prompt_rows(ids: Any) -> list[Any]:
    """`prompt_logprobs`: the target first, then the top k in order, where it may occur too."""
    rows: list[Any] = [None]
    for row, target in zip(LOGPROBS, ids[1:], strict=False):
        best = np.argsort(-row)
        chosen = dict.fromkeys([int(target), *(int(each) for each in best[:TOP_K])])
        ranks = {int(token): rank for rank, token in enumerate(best, 1)}
        rows.append(
            {
                str(each): {"logprob": float(row[each]), "rank": ranks[each], "decoded_token": None}
                for each in chosen
            }
        )
    return rows


def sampled(ids: Any, first_row: int) -> dict[str, Any]:
    """`logprobs` of generated tokens, by their ids."""
    tops, own = [], []
    for index, token in enumerate(ids):
        row = LOGPROBS[first_row + index]
        named = dict.fromkeys([int(token), *(int(each) for each in np.argsort(-row)[:TOP_K])])
        tops.append({f"token_id:{each}": float(row[each]) for each in named})
        own.append(float(row[token]))
    return {"tokens": [f"token_id:{each}" for each in ids], "token_logprobs": own, "top_logprobs": tops}


def scored(
    length: int, start: int, *, takes_tokens: bool = True
) -> tuple[VllmServer, ScoreInput, dict[str, Any]]:
    dialect = VllmServer(MODEL, takes_tokens=takes_tokens, max_query_tokens=4)
    item = ScoreInput(token_ids=IDS[:length], start=start, options=OPTIONS)
    answer: dict[str, Any] = {"prompt_logprobs": prompt_rows(IDS[:length])}
    if length == len(IDS):
        answer["prompt_logprobs"].pop()
        answer["logprobs"] = sampled(IDS[-1:], length - 2)
    if not takes_tokens or length == len(IDS):
        answer = {"choices": [answer]}
    return dialect, item, answer


@pytest.mark.parametrize("takes_tokens", [True, False])
@pytest.mark.parametrize(("length", "start"), [(6, 1), (6, 5), (8, 1), (8, 7)])
def test_rows_of_prompts_are_read(length: int, start: int, takes_tokens: bool) -> None:
    dialect, item, answer = scored(length, start, takes_tokens=takes_tokens)
    request = dialect.score_request(item, TOP_K)
    forced = length == len(IDS)
    assert request.path == (TOKENS if takes_tokens and not forced else COMPLETIONS)
    if forced:
        assert (request.body["prompt"], request.body["allowed_token_ids"]) == (IDS[:-1].tolist(), [8])
    assert_agrees(dialect.read_scores(item, TOP_K, answer), item.token_ids, LOGPROBS, top_k=TOP_K)


def npy(array: Any) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def test_queried_ids_travel_and_come_back() -> None:
    dialect, item, answer = scored(6, 2)
    query = np.array([[1, -1], [3, 11], [0, 2], [4, -1]], np.int32)
    item = ScoreInput(token_ids=item.token_ids, start=2, query_token_ids=query, options=OPTIONS)
    body = dialect.score_request(item, TOP_K).body["sampling_params"]
    assert (body["prompt_logprob_start"], body["prompt_logprob_token_ids"]) == (1, query.tolist())
    wanted = np.where(
        query < 0, -np.inf, np.take_along_axis(LOGPROBS[1:5], query.clip(0).astype(np.int64), axis=1)
    )
    answer["prompt_token_id_logprobs"] = npy(wanted.astype(np.float32))
    found = dialect.read_scores(item, TOP_K, answer).query_logprobs
    assert found is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    huge = base64.b64encode(
        base64.b64decode(npy(np.zeros(1, np.float32))).replace(b"(1,)", b"(1000000000000,)")
    ).decode()
    for bad in (
        None,
        "*",
        huge,
        npy(wanted.astype(np.float64)),
        npy(np.full_like(wanted, np.nan, np.float32)),
        npy(wanted[1:]),
    ):
        answer["prompt_token_id_logprobs"] = bad
        with pytest.raises(StillhouseError) as caught:
            dialect.read_scores(item, TOP_K, answer)
        assert caught.value.reason is Reason.TENSOR_INVALID
    whole = ScoreInput(token_ids=IDS, start=6, query_token_ids=query[:2], options=OPTIONS)
    with pytest.raises(StillhouseError, match="takes 7"):
        dialect.score_request(whole, TOP_K)


def _row(index: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda answer: change(answer["prompt_logprobs"][index])


@pytest.mark.parametrize(
    ("change", "reason", "part"),
    [
        (lambda answer: answer["prompt_logprobs"].pop(), Reason.TENSOR_INVALID, "5 rows"),
        (lambda answer: answer["prompt_logprobs"].append({}), Reason.TENSOR_INVALID, "at most 6"),
        (lambda answer: answer.pop("prompt_logprobs"), Reason.TENSOR_INVALID, "no list"),
        (_row(2, lambda row: row.pop("7")), Reason.TENSOR_INVALID, "leaves out"),
        (_row(2, lambda row: row.update({"7": {"logprob": None}})), Reason.NON_FINITE, "position 2"),
        (_row(2, lambda row: row.update({"7": {"logprob": "-1"}})), Reason.TENSOR_INVALID, "not a number"),
        (_row(2, lambda row: row.update({"7": 1})), Reason.TENSOR_INVALID, "another form"),
        (_row(2, lambda row: row.update({"07": {"logprob": -1}})), Reason.TENSOR_INVALID, "twice"),
        (_row(2, lambda row: row.update({"12": {"logprob": -9}})), Reason.TENSOR_INVALID, "config.json"),
        (_row(2, lambda row: row.update({"-1": {"logprob": -9}})), Reason.TENSOR_INVALID, "not a token id"),
        (_row(2, lambda row: row.update({"7": {"logprob": 0.1}})), Reason.TENSOR_INVALID, "above 0"),
    ],
)
def test_each_value_of_a_prompt_is_checked(
    change: Callable[[dict[str, Any]], Any], reason: Reason, part: str
) -> None:
    dialect, item, answer = scored(6, 1)
    answer = copy.deepcopy(answer)
    change(answer)
    with pytest.raises(StillhouseError, match=part) as caught:
        dialect.read_scores(item, TOP_K, answer)
    assert caught.value.reason is reason


def test_samples_are_read_and_checked() -> None:
    dialect = VllmServer(MODEL, takes_tokens=True)
    item = GenerateInput(
        token_ids=IDS[:3], adapter="a", temperature=0.5, max_new_tokens=9, seed=-1, options=OPTIONS
    )
    body = dialect.generate_request(item, TOP_K, stream=True).body
    assert (body["model"], body["max_tokens"], body["stop_token_ids"]) == ("upstream-a", 5, [0])
    assert (body["logit_bias"], body["seed"]) == ({"10": -100.0, "11": -100.0}, 2**63 - 1)
    choice = {"token_ids": [2, 9], "logprobs": sampled([2, 9], 2), "finish_reason": None}
    piece = dialect.read_piece(item, TOP_K, {"choices": [choice]}, 3)
    assert (piece.token_ids.tolist(), piece.finish) == ([2, 9], "")
    assert piece.distributions is not None
    assert_agrees(piece.distributions, IDS[:5], LOGPROBS, top_k=TOP_K)
    last = dialect.read_piece(item, TOP_K, {"choices": [{"token_ids": [], "finish_reason": "length"}]}, 5)
    assert (len(last.token_ids), last.finish) == (0, "length")
    assert dialect.read_piece(item, TOP_K, {"choices": []}, 5).finish == ""
    for change, reason, part in (
        ({"token_ids": [2, 8]}, Reason.TENSOR_INVALID, "other tokens"),
        ({"token_ids": [2] * 6}, Reason.TENSOR_INVALID, "at most 5"),
        ({"token_ids": [2, 11]}, Reason.TOKEN_OUT_OF_RANGE, "another seed"),
        ({"logprobs": None}, Reason.TENSOR_INVALID, "another form"),
        ({"logprobs": sampled([2], 2)}, Reason.TENSOR_INVALID, "other tokens"),
        ({"logprobs": {"tokens": ["a", "b"]}}, Reason.TENSOR_INVALID, "by their text"),
        ({"finish_reason": "abort"}, Reason.TEACHER_UNREACHABLE, "before its end"),
        ({"finish_reason": ["stop"]}, Reason.TEACHER_UNREACHABLE, "before its end"),
    ):
        with pytest.raises(StillhouseError, match=part) as caught:
            dialect.read_piece(item, TOP_K, {"choices": [{**choice, **change}]}, 3)
        assert caught.value.reason is reason
    with pytest.raises(StillhouseError, match="middle of an answer"):
        dialect.read_piece(item, TOP_K, {"error": {"message": "x"}}, 3)


class _Watched(VllmServer):
    """Notes the threads that read."""

    threads: ClassVar[set[threading.Thread]] = set()

    def read_scores(self, item: ScoreInput, top_k: int, answer: Any) -> Distributions:
        self.threads.add(threading.current_thread())
        return super().read_scores(item, top_k, answer)

    def read_piece(self, item: GenerateInput, top_k: int, answer: Any, position: int) -> Piece:
        self.threads.add(threading.current_thread())
        return super().read_piece(item, top_k, answer, position)


async def test_rows_are_read_off_the_event_loop_and_a_whole_sample_has_an_end() -> None:
    _, item, answer = scored(6, 1)
    whole = GenerateInput(token_ids=IDS[:3], max_new_tokens=2, single_chunk=True, options=OPTIONS)
    with http_server(lambda asked: Reply(body=answer if asked.path == TOKENS else {"choices": []})) as server:
        client = HttpClient(Upstream(url=server.url), concurrency=1, timeout_s=20.0)
        dialect = _Watched(MODEL, takes_tokens=True)
        assert_agrees(await score(client, dialect, item, TOP_K), item.token_ids, LOGPROBS, top_k=TOP_K)
        with pytest.raises(StillhouseError, match="without a reason") as caught:
            await anext(generate(client, dialect, whole, TOP_K))
        await client.close()
    assert caught.value.reason is Reason.TEACHER_UNREACHABLE
    assert dialect.threads
    assert threading.current_thread() not in dialect.threads
