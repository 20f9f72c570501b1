"""Engine on an upstream server: requests over HTTP, by the dialect that the probe chose; it loads no model."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.settings import bad_setting
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.config import BATCH_TOKENS, TeacherConfig
from stillhouse.teacher_service.engine import (
    DistributionOptions,
    EngineInfo,
    GeneratedChunk,
    GenerateInput,
    LoadedAdapter,
    ScoreInput,
)
from stillhouse.teacher_service.engines.openai.calls import generate, score
from stillhouse.teacher_service.engines.openai.credentials import read_upstream
from stillhouse.teacher_service.engines.openai.dialect import Dialect, Piece, ServedModel
from stillhouse.teacher_service.engines.openai.discovery import (
    ListedModel,
    Server,
    discover,
    list_models,
    output_rows,
)
from stillhouse.teacher_service.engines.openai.http_client import HttpClient
from stillhouse.teacher_service.engines.openai.probe import TOLERANCE_NATS, Ability, Probe
from stillhouse.teacher_service.models.adapter_files import MAX_NAME_CHARS
from stillhouse.teacher_service.models.files import locate_model
from stillhouse.teacher_service.models.tokenizer import TextCodec

CHECK_INTERVAL_S, CHECK_TIMEOUT_S = 30.0, 10.0
"""Interval and longest wait of the question whether the server still has the model."""

log = structlog.get_logger(__name__)


class OpenAiEngine:
    """Engine on another server, which samples, batches and caches by itself.

    Distributions are at temperature 1, before any sampling parameter. `sampling_logprobs` have values where the server
    knows them: for greedy samples (0), at temperature 1 without top-p, top-k and padding of the output layer to exclude,
    and, without the three, at any temperature where it reports them after temperature.
    """

    codec: TextCodec
    """Set by `load`, of the tokenizer that it was given."""

    def __init__(self, client: HttpClient, model: ServedModel, ability: Ability, info: EngineInfo) -> None:
        self._client = client
        self._model = model
        self._dialect: Dialect = ability.dialect
        self._scoring = ability.scoring
        self.info = info
        self._checked_at_s = time.monotonic()
        self._reachable = True
        self._closed = False

    @classmethod
    async def load(cls, config: TeacherConfig) -> OpenAiEngine:
        """Finds the server's kind, its model and what it can do.

        Raises:
            StillhouseError: INVALID_CONFIG for settings, an address, a key or a tokenizer that does not fit, and for a server
                without what a teacher needs; MODEL_NOT_FOUND without the tokenizer; TEACHER_UNREACHABLE.
        """
        upstream = read_upstream(config.upstream, config.upstream_key_file, insecure=config.insecure)
        source = config.tokenizer_source
        files = await asyncio.to_thread(lambda: locate_model(source, config.revision, weights=False))
        codec = await asyncio.to_thread(TextCodec.load, source, config.revision)
        client = HttpClient(
            upstream, concurrency=config.upstream_concurrency, timeout_s=config.upstream_timeout_s
        )
        try:
            server = await discover(client, config.model)
            model = _served(config, server, codec, files.directory)
            probe = await asyncio.to_thread(Probe, client, model, codec)
            ability = await probe.run(
                server.kind, max_top_k=config.max_top_k, max_query_tokens=config.max_query_tokens
            )
        except BaseException:
            await client.close()
            raise
        info = _describe(config, server, model, ability)
        log.info(
            "upstream probed",
            upstream=upstream.url,
            server=info.engine,
            model=model.name,
            max_top_k=ability.max_top_k,
            adapters=len(model.adapters),
        )
        if not ability.keeps_seeds:
            log.warning("upstream does not keep seeds: the same seed gives other samples")
        engine = cls(client, model, ability, info)
        engine.codec = codec
        return engine

    async def score(self, item: ScoreInput) -> Distributions:
        """Scores one sequence; cancelling the task ends the request there. Raises `StillhouseError` (CAPABILITY)."""
        self._require(item.options, queries=item.query_token_ids is not None)
        if self._scoring is None:
            raise StillhouseError(
                Reason.CAPABILITY,
                f"The upstream server ({self.info.engine}) does not score given text. Use one with /v1/completions.",
            )
        return await score(self._client, self._scoring.dialect, item, self._columns(item.options))

    async def generate(self, item: GenerateInput) -> AsyncIterator[GeneratedChunk]:
        """Streams one sample; closing the iterator ends the request there."""
        if item.options is not None:
            self._require(item.options, queries=False)
            self._require_rows(item)
        if item.options is not None and self._dialect.tempered and item.temperature not in (0, 1):
            yield await self._generate_then_score(item, item.options)
            return
        top_k = 0 if item.options is None else self._columns(item.options)
        async with aclosing(generate(self._client, self._dialect, item, top_k)) as pieces:
            async for piece in pieces:
                yield self._chunk(item, piece, None if item.options is None else piece.distributions)

    async def load_adapter(self, name: str, path: Path) -> LoadedAdapter:  # noqa: ARG002
        """Raises `StillhouseError` (CAPABILITY): the server loads its adapters itself."""
        raise StillhouseError(
            Reason.CAPABILITY, f"Adapter {name!r} cannot be loaded through this teacher. Load it there."
        )

    async def unload_adapter(self, name: str) -> None:
        """Raises `StillhouseError` (CAPABILITY), as `load_adapter`."""
        await self.load_adapter(name, Path())

    async def check(self) -> None:
        """Compares the server's models and the probe with those of the start, now and then.

        While the server cannot be reached, requests fail and this teacher stays.

        Raises `StillhouseError` (TEACHER_CHANGED) once it serves another model under the name.
        """
        if self._closed or time.monotonic() - self._checked_at_s < CHECK_INTERVAL_S:
            return
        try:
            listed = await list_models(self._client, timeout_s=CHECK_TIMEOUT_S)
            if self._model.name not in {each.name for each in listed}:
                raise _changed(self._model.name, "is not listed any more")
            await self._compare_probe()
            if not self._reachable:
                log.info("upstream reachable again")
            self._reachable = True
        except StillhouseError as error:
            if error.reason is Reason.TEACHER_CHANGED:
                raise
            if self._reachable:
                log.warning("upstream unreachable", error=error.message)
            self._reachable = False
        self._checked_at_s = time.monotonic()

    async def close(self) -> None:
        """Ends all requests."""
        self._closed = True
        await self._client.close()

    async def _compare_probe(self) -> None:
        """Raises `StillhouseError` (TEACHER_CHANGED) if the probe has other log-probabilities, twice: busy kernels differ too."""
        if self._scoring is None:
            return
        item = ScoreInput(token_ids=self._scoring.token_ids, start=1, options=DistributionOptions(top_k=0))
        for _ in range(2):
            found = await score(self._client, self._scoring.dialect, item, 0)
            if np.abs(found.target_logprobs - self._scoring.target_logprobs).max() <= TOLERANCE_NATS:
                return
        raise _changed(self._model.name, "gives other log-probabilities than before")

    async def _generate_then_score(self, item: GenerateInput, options: DistributionOptions) -> GeneratedChunk:
        """A whole sample, with rows of its text as a prompt, because those of the sample are after temperature."""
        pieces = [
            piece
            async for piece in generate(self._client, self._dialect, replace(item, single_chunk=True), 0)
        ]
        whole = replace(
            pieces[-1],
            token_ids=np.concatenate([each.token_ids for each in pieces]),
            logprobs=np.concatenate([each.logprobs for each in pieces]),
        )
        rows = None
        if len(whole.token_ids):
            ids = np.concatenate([item.token_ids, whole.token_ids])
            asked = ScoreInput(
                token_ids=ids, start=len(item.token_ids), adapter=item.adapter, options=options
            )
            rows = await self.score(asked)
        return self._chunk(item, whole, rows)

    def _chunk(self, item: GenerateInput, piece: Piece, rows: Distributions | None) -> GeneratedChunk:
        known = piece.logprobs
        if item.temperature == 0:
            known = np.zeros(len(piece.token_ids), np.float32)
        elif (
            item.top_p != 1
            or 0 < item.top_k < self._model.vocab_size
            or self._dialect.excludes_padding
            or not (item.temperature == 1 or self._dialect.tempered)
        ):
            known = np.zeros(0, np.float32)
        return GeneratedChunk(
            token_ids=piece.token_ids, sampling_logprobs=known, distributions=rows, finish=piece.finish
        )

    def _columns(self, options: DistributionOptions) -> int:
        return min(options.top_k, self._model.vocab_size)

    def _require(self, options: DistributionOptions, *, queries: bool) -> None:
        more = (options.temperatures, options.num_sampled_tokens, options.entropy, options.hidden_states)
        if any(more) or (queries and not self.info.max_query_tokens):
            raise StillhouseError(
                Reason.CAPABILITY,
                f"The upstream server ({self.info.engine}) reports top-k, target and tail. Everything else comes from a teacher "
                "started with --engine vllm or --engine hf.",
            )

    def _require_rows(self, item: GenerateInput) -> None:
        """Raises `StillhouseError` (CAPABILITY) for distributions that a server which only generates does not give."""
        if self._scoring is not None:
            return
        if not self._dialect.gives_rows:
            why = "gives no log-probabilities that --tokenizer can read: ask for text without distributions"
        elif self._dialect.tempered and item.temperature not in (0, 1):
            why = f"gives log-probabilities after temperature, which is {item.temperature:g}: take 1 or 0"
        else:
            return
        raise StillhouseError(Reason.CAPABILITY, f"The upstream server ({self.info.engine}) {why}.")


def _served(config: TeacherConfig, server: Server, codec: TextCodec, directory: Path) -> ServedModel:
    longest = server.max_sequence_tokens or config.max_sequence_tokens or 0
    if not longest:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            "The upstream server does not tell the longest sequence of its model. Give it by --max-sequence-tokens.",
        )
    if config.max_sequence_tokens is not None and config.max_sequence_tokens > longest:
        raise bad_setting(
            "--max-sequence-tokens",
            config.max_sequence_tokens,
            f"The upstream model takes {longest} tokens: lower it.",
        )
    vocab_size = output_rows(directory) or codec.tokenizer_size
    return ServedModel(
        name=server.base.name,
        vocab_size=vocab_size,
        tokenizer_size=min(codec.tokenizer_size, vocab_size),
        max_sequence_tokens=longest,
        eos_token_ids=codec.eos_token_ids,
        adapters={each.name: each.name for each in server.adapters if len(each.name) <= MAX_NAME_CHARS},
    )


def _describe(config: TeacherConfig, server: Server, model: ServedModel, ability: Ability) -> EngineInfo:
    fingerprint = _fingerprint(server.base, config.revision, model.vocab_size)
    kind = server.kind if server.kind != "other" else "server"
    capabilities = set()
    max_query_tokens = ability.scoring.dialect.max_query_tokens if ability.scoring else 0
    if max_query_tokens:
        capabilities.add(teacher_pb2.CAPABILITY_QUERY_LOGPROBS)
    notes = [f"{kind} {server.version}".rstrip()]
    if ability.scoring is None:
        capabilities.add(teacher_pb2.CAPABILITY_GENERATION_ONLY)
        notes.append("chat only")
    if not ability.keeps_seeds:
        notes.append("seeds not kept")
    return EngineInfo(
        model=model.name,
        revision="",
        model_fingerprint=fingerprint,
        tokenizer_size=model.tokenizer_size,
        vocab_size=model.vocab_size,
        max_sequence_tokens=min(
            config.max_sequence_tokens or model.max_sequence_tokens, model.max_sequence_tokens
        ),
        max_top_k=ability.max_top_k,
        max_query_tokens=max_query_tokens,
        capabilities=frozenset(capabilities),
        engine=f"openai ({', '.join(notes)})",
        dtype="unknown",
        quantization="",
        eos_token_ids=model.eos_token_ids,
        max_adapters=len(model.adapters),
        batch_tokens=BATCH_TOKENS,
        max_running_samples=config.upstream_concurrency,
        adapters=tuple(
            LoadedAdapter(name=each.name, fingerprint=_fingerprint(each, fingerprint, 0), rank=0)
            for each in server.adapters
            if each.name in model.adapters
        ),
        upstream=True,
    )


def _fingerprint(model: ListedModel, revision: str, vocab_size: int) -> str:
    """Hex SHA-256 over a model's name and origin: the server does not show its weights."""
    content = {"name": model.name, "root": model.root, "revision": revision, "vocab_size": vocab_size}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _changed(model: str, what: str) -> StillhouseError:
    return StillhouseError(
        Reason.TEACHER_CHANGED,
        f"The upstream server's model {model} {what}. Start this teacher again with the model that is there.",
    )
