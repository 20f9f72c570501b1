"""What the service asks of an engine: arrays in, arrays out; requests are checked before they come here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from stillhouse.protos.tensors.distributions import Distributions

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
Finish = Literal["", "stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """The loaded model and the limits of its engine."""

    model: str
    """Hugging Face id or path, as the operator gave it."""
    revision: str
    """Commit of the weights where they came from a hub, else empty."""
    model_fingerprint: str
    """Hex SHA-256; equal fingerprints mean the same numbers."""
    tokenizer_size: int
    """Tokens that the tokenizer knows; request ids are below it."""
    vocab_size: int
    """Rows of the output layer; distributions are normalised over all of them."""
    max_sequence_tokens: int
    """Longest sequence, prompt and completion together."""
    max_top_k: int
    """Largest `DistributionOptions.top_k`."""
    max_query_tokens: int
    """Most ids per position in `ScoreItem.query_token_ids`; 0 where there is no such capability."""
    capabilities: frozenset[int]
    """Values of the contract's `Capability`."""
    engine: str
    """Name, version and scoring tier, such as "vllm 0.32.0 tier public"."""
    dtype: str
    """Type of the computation, such as "float32"."""
    quantization: str
    """Quantisation method; empty if none."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a text."""
    max_adapters: int
    """Adapters that can be loaded at once."""
    batch_tokens: int = 8192
    """Tokens that it computes at once; a few times as many keep it busy."""
    max_running_samples: int = 256
    """Samples that it writes side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributionOptions:
    """What to report at each position."""

    top_k: int
    """Likeliest tokens to report, in [0, max_top_k]; the engine reports min(top_k, vocab_size)."""
    temperatures: tuple[float, ...] = ()
    """Temperatures to report log-partitions for, each > 0."""
    num_sampled_tokens: int = 0
    """Independent draws to report at each position."""
    seed: int = 0
    """Seed of these draws; with the sequence, the position and the draw it fixes the drawn id."""
    entropy: bool = False
    """Report the entropy, in nats."""
    hidden_states: bool = False
    """Report the final hidden states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreItem:
    """One sequence to score."""

    token_ids: Int32Array
    """[T], T >= 2, each in [0, tokenizer_size)."""
    start: int
    """First position to score, in [1, T - 1]; row t speaks of token start + t."""
    adapter: str = ""
    """Name of a loaded adapter; empty for the base model."""
    query_token_ids: Int32Array | None = None
    """[T - start, Q], -1 where a row has fewer."""
    options: DistributionOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateItem:
    """One sample to write."""

    token_ids: Int32Array
    """[P], P >= 1: the prompt."""
    adapter: str = ""
    """Name of a loaded adapter; empty for the base model."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Share of the probability to draw from, in (0, 1]."""
    top_k: int = 0
    """Likeliest tokens to draw from; 0 is all."""
    max_new_tokens: int = 256
    """At most max_sequence_tokens - P."""
    seed: int | None = None
    """Fixes the text, however items are batched; None draws a fresh one."""
    options: DistributionOptions | None = None
    """What to report for every new token; None reports nothing."""
    whole: bool = False
    """Nobody reads along: the engine may give the sample as one piece."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedPiece:
    """The next tokens of one sample; the last piece, and only it, has a finish."""

    token_ids: Int32Array
    """[n]; may be empty in the last piece. An end token that was written is part of it."""
    sampling_logprobs: Float32Array
    """[n]: log-probability of each token under the distribution that it was drawn from; 0 when greedy. [0] where the engine
    cannot tell, for a whole sample or not at all."""
    distributions: Distributions | None = None
    """[n] rows at temperature 1, start counted from the first token of the prompt."""
    finish: Finish = ""
    """"stop" after an end token, "length" at a limit, "" while it goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedAdapter:
    """A LoRA adapter that requests can name."""

    name: str
    fingerprint: str
    """Hex SHA-256 over its configuration and weights."""
    rank: int
    path: Path = field(compare=False)
    """Directory that it was loaded from."""


class Engine(Protocol):
    """A model that scores and writes; the servicer has checked lengths, ids, top_k and capabilities."""

    @property
    def info(self) -> EngineInfo:
        """What is loaded."""
        ...

    async def score(self, item: ScoreItem) -> Distributions:
        """Distributions of the T - start positions of `item`; cancelling the task aborts the work.

        Raises `StillhouseError`: NON_FINITE for logits that are not numbers, ADAPTER_NOT_FOUND, OUT_OF_MEMORY.
        """
        ...

    def generate(self, item: GenerateItem) -> AsyncIterator[GeneratedPiece]:
        """Pieces of one sample as they are written; closing the iterator aborts the work."""
        ...

    async def load_adapter(self, name: str, path: Path) -> LoadedAdapter:
        """Loads an adapter under a name that is not loaded.

        Raises `StillhouseError`: ADAPTER_INVALID for files that are none, ADAPTER_SLOTS when all slots are taken.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Frees a loaded adapter that no request uses."""
        ...

    def adapters(self) -> tuple[LoadedAdapter, ...]:
        """The loaded adapters, in the order of loading."""
        ...

    async def check(self) -> None:
        """Raises `StillhouseError` if the engine is dead."""
        ...

    async def close(self) -> None:
        """Aborts all work and frees the model."""
        ...
