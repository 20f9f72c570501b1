"""vLLM's HTTP responses as typed objects, which msgspec reads several times faster than `json` builds dictionaries."""

from __future__ import annotations

import msgspec


class Candidate(msgspec.Struct):
    """One of the top-k tokens at a position of a prompt."""

    logprob: float
    rank: int


class ScoredChoice(msgspec.Struct):
    """Scores of a prompt: token id to candidate at each position, nothing at the first."""

    prompt_logprobs: list[dict[int, Candidate] | None]


class Scored(msgspec.Struct):
    """Response to a request with `prompt_logprobs`."""

    choices: list[ScoredChoice]


class Logprobs(msgspec.Struct):
    """Token name to log-probability at each generated position."""

    top_logprobs: list[dict[str, float]]


class WrittenChoice(msgspec.Struct):
    """The next tokens of a sample."""

    logprobs: Logprobs | None = None


class Event(msgspec.Struct):
    """One event of a streamed completion."""

    choices: list[WrittenChoice]


scored = msgspec.json.Decoder(Scored, strict=False)
"""Ids are JSON keys, read as numbers."""
event = msgspec.json.Decoder(Event)
