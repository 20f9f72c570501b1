"""The engine protocol between service and model: arrays in, arrays out, of requests already validated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from stillhouse.protos.rows.conversation import Turns
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
    """Hex SHA-256; equal fingerprints mean the same logits."""
    tokenizer_size: int
    """Tokens that the tokenizer knows; request ids are below it."""
    vocab_size: int
    """Rows of the output layer; distributions are normalised over all of them."""
    max_sequence_tokens: int
    """Longest sequence, prompt and completion together."""
    max_top_k: int
    """Largest `DistributionOptions.top_k`."""
    max_query_tokens: int
    """Most ids per position in `ScoreInput.query_token_ids`; 0 without that capability."""
    capabilities: frozenset[int]
    """Values of the contract's `Capability`."""
    engine: str
    """Name, version and scoring tier, such as "vllm 0.32.0 tier public"."""
    dtype: str
    """Type of the computation, such as "float32"."""
    quantization: str
    """Quantisation method; empty if none."""
    eos_token_ids: tuple[int, ...]
    """End-of-sequence ids."""
    max_adapters: int
    """Adapters that can be loaded at once."""
    batch_tokens: int = 8192
    """Tokens per engine batch; a few batches in flight keep it busy."""
    max_running_samples: int = 256
    """Samples that it generates concurrently."""
    class_names: tuple[str, ...] = ()
    """Names of the classes of a classifier, by class; empty for a language model."""
    num_token_types: int = 0
    """Token types of a classifier that tells the texts of a pair by them."""
    num_layers: int = 0
    """Layers of the model; 0 where it gives no hidden states."""
    hidden_size: int = 0
    """Units of a hidden state; 0 where it gives none."""
    upstream: bool = False
    """The model is another server's."""
    adapters: tuple[LoadedAdapter, ...] = ()
    """Adapters that the engine has from the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributionOptions:
    """Quantities to report at each position."""

    top_k: int
    """Number of most likely tokens to report, in [0, max_top_k]; the engine reports min(top_k, vocab_size)."""
    temperatures: tuple[float, ...] = ()
    """Temperatures to report log-partitions for, each > 0."""
    num_sampled_tokens: int = 0
    """Samples to report at each position, independent unless stratified."""
    seed: int = 0
    """Seed of these samples; seed, prefix and sample index together fix the sampled id; of stratified ones their number, too."""
    entropy: bool = False
    """Report the entropy, in nats."""
    hidden_states: bool = False
    """Report the final hidden states."""
    sample_tail: bool = False
    """Sample from the tokens outside the top k alone."""
    sample_temperature: float = 1.0
    """Temperature of these samples, > 0."""
    sampled_logprobs: bool = False
    """Report the log-probabilities of the samples."""
    half_logprobs: bool = False
    """The top-k log-probabilities travel as float16, so that an engine may round them before that."""
    stratified_samples: bool = False
    """Sample one token in each of equal parts of the cumulative distribution, at the same place of each; ids ascend."""
    classes: bool = False
    """Report the distribution over classes of the whole sequence, as one row (protos/tensors/classes.py); goes alone, or with
    `hidden_layers`."""
    hidden_layers: tuple[int, ...] = ()
    """Report the states after so many layers, ascending, each in [0, num_layers]; of a classifier those of all tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreInput:
    """One sequence to score."""

    token_ids: Int32Array
    """[T], T >= 2, each in [0, tokenizer_size)."""
    start: int
    """First position to score, in [1, T - 1]; row t is the distribution of token start + t."""
    adapter: str = ""
    """Name of a loaded adapter; empty for the base model."""
    query_token_ids: Int32Array | None = None
    """[T - start, Q], -1 where a row has fewer."""
    token_type_ids: Int32Array | None = None
    """[T], each in [0, num_token_types), for a classifier; None means 0."""
    options: DistributionOptions
    on_reused: Callable[[int], None] | None = None
    """Told the number of tokens at the start that a prefix cache held, by an engine with one, before the rows are returned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateInput:
    """One sample to generate."""

    token_ids: Int32Array
    """[P], P >= 1: the prompt."""
    adapter: str = ""
    """Name of a loaded adapter; empty for the base model."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus: share of the probability to sample from, in (0, 1]."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 0 is all."""
    max_new_tokens: int = 256
    """At most max_sequence_tokens - P."""
    seed: int | None = None
    """Fixes the completion, however items are batched; None uses a fresh one."""
    options: DistributionOptions | None = None
    """Quantities to report for every new token; None reports nothing."""
    turns: Turns | None = None
    """The conversation that `token_ids` render, for engines that send messages; None for other prompts."""
    single_chunk: bool = False
    """The caller does not stream: the engine may return the sample as one chunk."""
    chunk_tokens: int = 0
    """Tokens that the caller waits for before it uses a chunk; the engine may make its chunks so long. 0 is any number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedChunk:
    """The next tokens of one sample; only its last chunk has a finish."""

    token_ids: Int32Array
    """[n]; may be empty in the last chunk. Includes a generated end token."""
    sampling_logprobs: Float32Array
    """[n]: log-probability of each token under the distribution it was sampled from; 0 when greedy. [0] where the
    engine does not know it, for the complete sample or not at all."""
    distributions: Distributions | None = None
    """[n] rows at temperature 1, start counted from the first token of the prompt."""
    finish: Finish = ""
    """"stop" after an end token, "length" at a limit, "" before the last chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedAdapter:
    """A LoRA adapter that requests can name."""

    name: str
    fingerprint: str
    """Hex SHA-256 over its configuration and weights."""
    rank: int
    path: Path | None = field(default=None, compare=False)
    """Directory that it was loaded from; None for one of an upstream server."""


class Engine(Protocol):
    """A model that scores and generates. The servicer has validated lengths, ids, top_k and capabilities."""

    @property
    def info(self) -> EngineInfo:
        """The loaded model and its limits."""

    async def score(self, item: ScoreInput) -> Distributions:
        """Computes the distributions of the T - start positions of `item`, or its class row with `options.classes`; cancelling
        the task aborts the work.

        Raises `StillhouseError`: NON_FINITE for NaN or infinite logits, ADAPTER_NOT_FOUND, OUT_OF_MEMORY.
        """

    def generate(self, item: GenerateInput) -> AsyncIterator[GeneratedChunk]:
        """Streams the chunks of one sample; closing the iterator aborts the work."""

    async def load_adapter(self, name: str, path: Path) -> LoadedAdapter:
        """Loads an adapter under an unused name.

        Raises `StillhouseError`: ADAPTER_INVALID for malformed files, ADAPTER_SLOTS when all slots are taken.
        """

    async def unload_adapter(self, name: str) -> None:
        """Frees a loaded adapter that no request uses."""

    async def check(self) -> None:
        """Raises `StillhouseError` if the engine is dead."""

    async def close(self) -> None:
        """Aborts all work and frees the model."""
