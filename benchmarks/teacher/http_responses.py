"""vLLM's HTTP answers as typed objects: msgspec reads them several times faster than `json` makes dictionaries of them."""

from __future__ import annotations

import msgspec


class Candidate(msgspec.Struct):
    """One of the likeliest tokens at a position of a prompt."""

    logprob: float
    rank: int


class ScoredChoice(msgspec.Struct):
    """What was said of a prompt: token id to candidate at each position, nothing at the first."""

    prompt_logprobs: list[dict[int, Candidate] | None]


class Scored(msgspec.Struct):
    """The answer to a request with `prompt_logprobs`."""

    choices: list[ScoredChoice]


class Logprobs(msgspec.Struct):
    """Token name to log-probability at each written position."""

    top_logprobs: list[dict[str, float]]


class WrittenChoice(msgspec.Struct):
    """The next tokens of a sample."""

    logprobs: Logprobs | None = None


class Event(msgspec.Struct):
    """One event of a streamed completion."""

    choices: list[WrittenChoice]


scored = msgspec.json.Decoder(Scored, strict=False)
"""Ids are keys, which JSON quotes: they are read as numbers all the same."""
event = msgspec.json.Decoder(Event)
