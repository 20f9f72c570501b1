"""The dialect protocol: one server's requests and answers, as the engine needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import Finish, Float32Array, GenerateInput, Int32Array, ScoreInput
from stillhouse.teacher_service.engines.openai.http_client import Request

MESSAGE_BYTES = 64 << 10
"""Bytes of an answer besides its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """The model of an upstream server."""

    name: str
    """As requests call it."""
    vocab_size: int
    tokenizer_size: int
    max_sequence_tokens: int
    eos_token_ids: tuple[int, ...]
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Name of an adapter, as clients call it, to its name on the server."""

    @property
    def padding(self) -> range:
        """Ids of the output layer that the tokenizer does not know."""
        return range(self.tokenizer_size, self.vocab_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The next tokens of a sample."""

    token_ids: Int32Array
    """[n], with an end token."""
    logprobs: Float32Array
    """[n]: log-probability of each token in the distribution that the server reports."""
    distributions: Distributions | None
    """[n] rows."""
    finish: Finish


class Dialect(Protocol):
    """Requests for text to one kind of server, and its answers, of which every value is checked."""

    streams: bool
    """Samples come in pieces."""
    tempered: bool
    """Rows of generated tokens are of the distribution after temperature, not the model's own."""
    excludes_padding: bool
    """Samples are of the distribution without the padding of the output layer."""
    gives_rows: bool
    """It reports log-probabilities of generated tokens."""

    def generate_request(self, item: GenerateInput, top_k: int, *, stream: bool) -> Request:
        """Builds the request of one sample; `top_k` candidates of each token are reported."""

    def read_piece(self, item: GenerateInput, top_k: int, answer: Any, position: int) -> Piece:
        """Reads the next tokens of a sample, the first of which is at `position`.

        Raises `StillhouseError` (TENSOR_INVALID, NON_FINITE, TOKEN_OUT_OF_RANGE, TEACHER_UNREACHABLE).
        """


class ScoringDialect(Dialect, Protocol):
    """Requests to a server that scores given text as well."""

    max_query_tokens: int
    """Most queried ids per position; 0 without them."""

    def score_request(self, item: ScoreInput, top_k: int) -> Request:
        """Builds the request that scores a sequence. Raises `StillhouseError` for one that the server cannot score."""

    def read_scores(self, item: ScoreInput, top_k: int, answer: Any) -> Distributions:
        """Reads its rows. Raises `StillhouseError` (TENSOR_INVALID, NON_FINITE)."""


def require_known(token_ids: Int32Array, model: ServedModel) -> None:
    """Raises `StillhouseError` (TOKEN_OUT_OF_RANGE) for generated ids that the tokenizer does not know."""
    if len(token_ids) and int(token_ids.max()) >= model.tokenizer_size:
        raise StillhouseError(
            Reason.TOKEN_OUT_OF_RANGE,
            f"The model generated the id {int(token_ids.max())}, and its tokenizer knows {model.tokenizer_size}. "
            "Ask again with another seed.",
        )
