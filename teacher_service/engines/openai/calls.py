"""One call of the upstream server: a sequence scored, or a sample generated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.openai.dialect import Dialect, Piece, ScoringDialect
from stillhouse.teacher_service.engines.openai.http_client import HttpClient


async def score(client: HttpClient, dialect: ScoringDialect, item: ScoreInput, top_k: int) -> Distributions:
    """Distributions of a sequence with `top_k` columns. Raises `StillhouseError` as `HttpClient.post` and the dialect."""
    request = dialect.score_request(item, top_k)
    answer = await client.post(request)
    return await asyncio.to_thread(dialect.read_scores, item, top_k, answer)


async def generate(
    client: HttpClient, dialect: Dialect, item: GenerateInput, top_k: int
) -> AsyncGenerator[Piece]:
    """Pieces of a sample, of which the last has a finish. Raises `StillhouseError` as `HttpClient.stream` and the dialect."""
    streams = dialect.streams and not item.single_chunk
    request = dialect.generate_request(item, top_k, stream=streams)
    position = len(item.token_ids)
    if not streams:
        answer = await client.post(request)
        piece = await asyncio.to_thread(dialect.read_piece, item, top_k, answer, position)
        if not piece.finish:
            raise _endless()
        yield piece
        return
    async with aclosing(client.stream(request)) as events:
        async for event in events:
            piece = await asyncio.to_thread(dialect.read_piece, item, top_k, event, position)
            position += len(piece.token_ids)
            if position > len(item.token_ids) + item.max_new_tokens:
                break
            if len(piece.token_ids) or piece.finish:
                yield piece
            if piece.finish:
                return
    raise _endless()


def _endless() -> StillhouseError:
    return StillhouseError(
        Reason.TEACHER_UNREACHABLE,
        "The upstream server ended a sample without a reason, or went beyond max_new_tokens. Look into its log, and ask again.",
    )
