"""Probe of an upstream server at start: a text with known properties shows what it can do, and whether its numbers are right."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.conversation import Turns
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import (
    DistributionOptions,
    Float32Array,
    GenerateInput,
    Int32Array,
    ScoreInput,
)
from stillhouse.teacher_service.engines.openai.calls import generate, score
from stillhouse.teacher_service.engines.openai.chat_server import ChatServer
from stillhouse.teacher_service.engines.openai.dialect import Dialect, ScoringDialect, ServedModel
from stillhouse.teacher_service.engines.openai.discovery import Kind
from stillhouse.teacher_service.engines.openai.http_client import HttpClient, Request, UpstreamRefusalError
from stillhouse.teacher_service.engines.openai.rows import fields, items, token_ids
from stillhouse.teacher_service.engines.openai.sglang_server import GENERATE, SglangServer
from stillhouse.teacher_service.engines.openai.vllm_server import COMPLETIONS, VllmServer
from stillhouse.teacher_service.models.tokenizer import TextCodec

PROBE_TEXT = (
    "The still house stands where two streams meet. In spring, 1823, its copper was cleaned with lemon and salt; the "
    'cooper wrote "ready" on every cask, and nobody drank before noon.'
)
PROBE_TOKENS, NEW_TOKENS = 48, 8
TOLERANCE_NATS = 0.3
"""Difference of log-probabilities that types, batches and kernels explain."""
CHAT_TOP_K = (20, 10, 5, 1, 0)
"""Limits of top_logprobs that chat APIs have."""
_PROBE_TURNS = Turns(messages=({"role": "user", "content": PROBE_TEXT},))
_NO_OPTIONS = DistributionOptions(top_k=0)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """Scores of a server that has them, with those of the probe."""

    dialect: ScoringDialect
    token_ids: Int32Array
    """[T]: the probe's tokens."""
    target_logprobs: Float32Array
    """[T - 1]: their log-probabilities, by which a changed model is noticed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """Result of the probe."""

    dialect: Dialect
    scoring: Scoring | None
    """None for a server that only generates."""
    max_top_k: int
    """Most candidates of a position, of prompts and of generated tokens."""
    keeps_seeds: bool
    """The same seed gave the same sample twice."""


class Probe:
    """Probes one model of one server."""

    def __init__(self, client: HttpClient, model: ServedModel, codec: TextCodec) -> None:
        """`codec` is the tokenizer that clients will use. Runs it: construct in a thread."""
        self._client = client
        self._model = model
        self._codec = codec
        room = model.max_sequence_tokens - NEW_TOKENS - 1
        self._text, self._text_ids = PROBE_TEXT, codec.encode(PROBE_TEXT)
        while len(self._text_ids) > room and " " in self._text:
            self._text = self._text.rpartition(" ")[0]
            self._text_ids = codec.encode(self._text)
        self._ids = self._text_ids[: min(PROBE_TOKENS, room)]
        if len(self._ids) < 4:
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"The upstream model takes {model.max_sequence_tokens} tokens, too few for the probe. Serve it with a longer "
                "context.",
            )

    async def run(self, kind: Kind, *, max_top_k: int, max_query_tokens: int) -> Ability:
        """Finds the best dialect that the server speaks, and its limits.

        Raises:
            StillhouseError: INVALID_CONFIG for another tokenizer than the model's, a server without log-probabilities of
                prompts, and numbers that are not those of the model; as `HttpClient.post`.
        """
        dialect: ScoringDialect = (
            SglangServer(self._model) if kind == "sglang" else await self._vllm(max_query_tokens)
        )
        if kind == "other" and not await _accepted(lambda: self._score(dialect, self._ids, 0)):
            return await self._chat(max_top_k)
        await self._check_tokenizer(kind)
        limit = await self._largest_top_k(dialect, min(max_top_k, self._model.vocab_size))
        rows = await self._score(dialect, self._ids, limit)
        self._check_normalised(rows)
        await self._check_greedy(dialect, limit)
        keeps_seeds = await self._keeps_seeds(dialect)
        if isinstance(dialect, SglangServer):
            tempered = await self._is_tempered(dialect, limit)
            dialect = SglangServer(self._model, tempered=tempered, sends_seeds=keeps_seeds)
        elif await self._is_tempered(dialect, limit):
            raise _unfit(
                "reports log-probabilities of generated tokens after temperature. Start it with --logprobs-mode raw_logprobs"
            )
        if isinstance(dialect, VllmServer) and dialect.max_query_tokens:
            dialect = await self._with_queries(dialect, min(max_query_tokens, limit))
        scoring = Scoring(dialect=dialect, token_ids=self._ids, target_logprobs=rows.target_logprobs)
        return Ability(dialect=dialect, scoring=scoring, max_top_k=limit, keeps_seeds=keeps_seeds)

    async def _vllm(self, max_query_tokens: int) -> VllmServer:
        """vLLM's token endpoint if the server has it, else its completions."""
        dialect = VllmServer(self._model, takes_tokens=True, max_query_tokens=max_query_tokens)
        if await _accepted(lambda: self._score(dialect, self._ids, 0)):
            return dialect
        return VllmServer(self._model, takes_tokens=False)

    async def _chat(self, max_top_k: int) -> Ability:
        """The ability of a server that scores nothing: conversations, with the candidates that it gives of each token."""
        dialect = ChatServer(self._model, self._codec, None)
        if not await _accepted(lambda: self._generate(dialect, self._ids, 0)):
            # Newer models of OpenAI know the limit by this name alone.
            dialect = ChatServer(self._model, self._codec, None, limit_field="max_completion_tokens")
            await self._generate(dialect, self._ids, 0)
        keeps_seeds = await self._keeps_seeds(dialect)
        named = dialect.with_tokens()
        limits = sorted({max_top_k, *(each for each in CHAT_TOP_K if each < max_top_k)}, reverse=True)
        for limit in limits:
            if await _accepted(partial(self._generate, named, self._ids, limit, temperature=0.0)):
                named = named.with_tokens(tempered=await self._is_first_tempered(named, limit))
                return Ability(dialect=named, scoring=None, max_top_k=limit, keeps_seeds=keeps_seeds)
        return Ability(dialect=dialect, scoring=None, max_top_k=0, keeps_seeds=keeps_seeds)

    async def _is_first_tempered(self, dialect: Dialect, top_k: int) -> bool:
        """Compares the first tokens of two temperatures, which continue the same text."""
        first = [
            (await self._generate(dialect, self._ids, top_k, temperature=each, max_new_tokens=1))[
                0
            ].distributions
            for each in (0.0, 2.0)
        ]
        values = [np.sort(rows.logprobs[0]) for rows in first if rows is not None and rows.num_rows]
        return len(values) < 2 or bool(np.abs(values[0] - values[1]).max(initial=0) > TOLERANCE_NATS)

    async def _check_tokenizer(self, kind: Kind) -> None:
        if kind == "sglang":
            body: dict[str, Any] = {
                "text": self._text,
                "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            answer = await self._client.post(Request(path=GENERATE, body=body, max_bytes=1 << 20))
            entries = items(fields(fields(answer).get("meta_info")).get("input_token_logprobs"), most=4096)
            read = token_ids([items(each, most=3)[1] for each in entries if each], most=4096)
        else:
            body = {
                "model": self._model.name,
                "prompt": self._text,
                "max_tokens": 1,
                "temperature": 0.0,
                "return_token_ids": True,
            }
            answer = await self._client.post(Request(path=COMPLETIONS, body=body, max_bytes=1 << 20))
            choices = items(fields(answer).get("choices"), most=1)
            read = token_ids(fields(choices[0] if choices else {}).get("prompt_token_ids") or [], most=4096)
            if not read:
                raise _unfit(
                    "does not return token ids (return_token_ids), by which this teacher reads its answers"
                )
        ours = self._text_ids.tolist()
        # Some tokenizers end a text with a token of their own.
        if read[: len(ours)] != ours or len(read) > len(ours) + 2:
            differs = next(
                (place for place, (a, b) in enumerate(zip(ours, read, strict=False)) if a != b), len(ours)
            )
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"--tokenizer is not the upstream model's: it reads the probe as {len(ours)} tokens, the server as {len(read)}, "
                f"and they differ from token {differs} on. Name the directory or hub id of the model that the server has.",
            )

    async def _largest_top_k(self, dialect: ScoringDialect, most: int) -> int:
        """The largest number of candidates in [0, most] that the server gives for prompts and for samples."""

        async def gives(top_k: int) -> bool:
            short = self._ids[:4]
            return await _accepted(lambda: self._score(dialect, short, top_k)) and await _accepted(
                lambda: self._generate(dialect, short, top_k, max_new_tokens=1)
            )

        if await gives(most):
            return most
        if not await gives(0):
            await self._score(dialect, self._ids[:4], 0)  # its refusal says why
            raise _unfit("gives no log-probabilities of generated tokens")
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if await gives(middle) else (low, middle)
        return low

    def _check_normalised(self, rows: Distributions) -> None:
        """Raises unless the tail fits below the last candidate: logits and values of another base do not."""
        top_k, vocab_size = rows.token_ids.shape[1], self._model.vocab_size
        if top_k == 0:
            return
        probs_TK = np.exp(rows.logprobs.astype(np.float64))
        rest = 1 - probs_TK.sum(axis=1)
        room = (vocab_size - top_k) * probs_TK[:, -1]
        if (rest > room * 1.05 + 0.02).any():
            raise _unfit(
                "reports numbers that are not normalised log-probabilities. Start vLLM with --logprobs-mode raw_logprobs"
            )

    async def _check_greedy(self, dialect: ScoringDialect, top_k: int) -> None:
        """Raises unless greedy samples take the likeliest token of the same text scored, with the same numbers."""
        prefix = self._ids[: len(self._ids) // 2]
        pieces = await self._generate(dialect, prefix, top_k, temperature=0.0)
        sample = np.concatenate([each.token_ids for each in pieces])
        said = np.concatenate([each.logprobs for each in pieces])
        if not len(sample):
            raise _unfit("generates nothing")
        scored = await self._score(dialect, np.concatenate([prefix, sample]), top_k, start=len(prefix))
        if np.abs(scored.target_logprobs - said).max() > TOLERANCE_NATS:
            raise _unfit(
                "gives other log-probabilities for a text that it generated than for the same text as a prompt"
            )
        # Padding of the output layer is likely in some models, and not sampled.
        known = np.where(scored.token_ids < self._model.tokenizer_size, scored.logprobs, -np.inf)
        if (known.max(axis=1, initial=-np.inf) - scored.target_logprobs > TOLERANCE_NATS).any():
            raise _unfit("generates greedily other tokens than the likeliest of its own distributions")

    async def _is_tempered(self, dialect: ScoringDialect, top_k: int) -> bool:
        pieces = await self._generate(dialect, self._ids[:8], top_k, temperature=2.0)
        rows = Distributions.concat([each.distributions for each in pieces if each.distributions is not None])
        whole = np.concatenate([self._ids[:8], *(each.token_ids for each in pieces)])
        scored = await self._score(dialect, whole, top_k, start=8)
        differences = [np.abs(scored.target_logprobs - rows.target_logprobs).max()]
        if top_k:
            differences += [np.abs(scored.logprobs - rows.logprobs).max()]
        return bool(max(differences) > TOLERANCE_NATS)

    async def _with_queries(self, dialect: VllmServer, most: int) -> VllmServer:
        """The dialect with queried ids if the server takes and answers them rightly, else without."""
        if most < 1:
            return VllmServer(self._model, takes_tokens=True)
        item = self._item(self._ids, 1)
        query = np.stack([self._ids[1:], np.full(len(self._ids) - 1, -1, np.int32)], axis=1)[
            :, : min(2, most)
        ]
        asked = replace(item, query_token_ids=query)
        try:
            found = await score(self._client, dialect, asked, 0)
        except StillhouseError as error:
            if not isinstance(error, UpstreamRefusalError) and error.reason is not Reason.TENSOR_INVALID:
                raise
            return VllmServer(self._model, takes_tokens=True)
        assert found.query_logprobs is not None
        if np.abs(found.query_logprobs[:, 0] - found.target_logprobs).max() > TOLERANCE_NATS:
            log.warning("upstream answers queried ids wrongly; they are not used")
            return VllmServer(self._model, takes_tokens=True)
        return VllmServer(self._model, takes_tokens=True, max_query_tokens=most)

    async def _keeps_seeds(self, dialect: Dialect) -> bool:
        samples: list[list[int]] = []

        async def sample() -> None:
            pieces = await self._generate(dialect, self._ids[:4], 0, seed=7)
            samples.append(np.concatenate([each.token_ids for each in pieces]).tolist())

        return await _accepted(sample) and await _accepted(sample) and samples[0] == samples[1]

    async def _score(
        self, dialect: ScoringDialect, ids: Int32Array, top_k: int, *, start: int = 1
    ) -> Distributions:
        return await score(self._client, dialect, self._item(ids, start), top_k)

    async def _generate(
        self,
        dialect: Dialect,
        ids: Int32Array,
        top_k: int,
        *,
        max_new_tokens: int = NEW_TOKENS,
        **sampling: Any,
    ) -> Sequence[Any]:
        item = GenerateInput(
            token_ids=ids,
            max_new_tokens=max_new_tokens,
            options=_NO_OPTIONS,
            turns=_PROBE_TURNS,
            single_chunk=True,
            **sampling,
        )
        return [piece async for piece in generate(self._client, dialect, item, top_k)]

    def _item(self, ids: Int32Array, start: int) -> ScoreInput:
        return ScoreInput(token_ids=ids, start=start, options=_NO_OPTIONS)


async def _accepted(call: Callable[[], Awaitable[Any]]) -> bool:
    """True if the server takes a request and gives all that it asks for."""
    try:
        await call()
    except UpstreamRefusalError as error:
        if error.status == 401:  # 403 is also vLLM's answer at an endpoint that is switched off
            raise
        return False
    except StillhouseError as error:
        if error.reason is not Reason.TENSOR_INVALID:
            raise
        return False
    return True


def _unfit(what: str) -> StillhouseError:
    return StillhouseError(
        Reason.INVALID_CONFIG,
        f"The upstream server {what}. What a server needs is in docs/guides/upstream.md; --engine vllm and --engine hf serve a "
        "model without one.",
    )
