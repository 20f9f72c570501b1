"""What a cache of teachers' answers is made of: keys by content, what a shard says of itself, and the columns of its rows.

A cache is a folder of Parquet shards and nothing else, so that pandas, DuckDB and Hugging Face `datasets` read it as it
is. A row is one sequence; every column is plain:

| column | type | what |
|---|---|---|
| key | string | address of the answer, `CacheMeta.key` |
| token_ids | list<int32> | the whole sequence, L ids |
| start | int32 | position that the first of the T = L - start rows of the answer predicts |
| top_token_ids, logprobs | list<int32>, list<float> | [T, K], row after row: `reshape(T, -1)` |
| target_logprobs, log_tail | list<float> | [T] |
| log_partitions, sampled_token_ids, query_token_ids, query_logprobs | lists, optional | [T, N], [T, R], [T, Q], [T, Q] |
| entropy | list<float>, optional | [T] |

What they mean is defined in protos/stillhouse/v1/tensor.proto. Codec "lossless" keeps every bit of the wire: logprobs
are float16 or float32 as they travelled. Codec "compact" keeps logprobs as float16 with COMPACT_BITS bits of fraction,
and the other numbers as float16.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import DistributionConfig, GetTeacherInfoResponse
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor

FORMAT = 1
"""Version of keys and columns; a reader refuses a later one."""
META = b"stillhouse"
"""Key of a shard's own description in its Parquet footer."""
SHARD = re.compile(r"(\d{6,12})-([0-9a-f]{64})\.parquet")
"""A shard's file name: its number, and the SHA-256 of its bytes."""
COMPACT_BITS = 5
"""Bits of fraction that codec "compact" keeps of a logprob: it is off by 1.6 % of itself at most."""
MAX_META_BYTES = 64 * 1024
"""Of a shard's description."""

Codec = Literal["lossless", "compact"]
CODECS: tuple[Codec, ...] = ("lossless", "compact")
_NAME_CHARACTERS = 4096
_MAX_COUNT = 2**31 - 1
_TEXTS = (
    "model",
    "teacher_fingerprint",
    "adapter",
    "adapter_fingerprint",
    "tokenizer_fingerprint",
    "name",
    "student_tokenizer_fingerprint",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheMeta:
    """What all answers of a shard have in common: who gave them, and what was asked for."""

    model: str
    """As the teacher names its model, for people."""
    teacher_fingerprint: str
    """GetTeacherInfoResponse.model_fingerprint."""
    adapter: str = ""
    """Name of the adapter, for people; empty for the base model."""
    adapter_fingerprint: str = ""
    """Empty for the base model."""
    tokenizer_fingerprint: str
    """Of the teacher's tokenizer."""
    tokenizer_size: int
    """Tokens that the tokenizer knows."""
    vocab_size: int
    """Rows of the teacher's output layer: every id is below it."""
    top_k: int
    """Likeliest tokens asked for, K; an answer has fewer only where the vocabulary has."""
    logprob_dtype: str = "float16"
    """Of the logprobs on the wire: "float16" or "float32"."""
    temperatures: tuple[float, ...] = ()
    """Of the columns of log_partitions, in this order."""
    entropy: bool = False
    """Whether there is entropy."""
    sampling: Mapping[str, Any] | None = None
    """Everything else that was asked for and decides the answer, such as number and seed of draws."""
    held_out: bool = False
    """Whether the text is kept for evaluation, so that nobody learns from it."""
    name: str = ""
    """By which the run that asked speaks of the teacher; empty if it has one only."""
    student_tokenizer_fingerprint: str = ""
    """Of the student that the text was tokenised for, if its tokenizer is another one, but compatible."""
    shared_size: int = 0
    """Ids below it mean the same to that student and to the teacher; 0 where there is no such student."""

    @classmethod
    def from_config(
        cls,
        info: GetTeacherInfoResponse,
        config: DistributionConfig,
        *,
        adapter: str = "",
        adapter_fingerprint: str = "",
    ) -> CacheMeta:
        """The description of what a teacher answers to `config`, or to a base model if there is no adapter."""
        full = config.logprob_dtype == Tensor.DATA_TYPE_FLOAT32
        return cls(
            model=info.model,
            teacher_fingerprint=info.model_fingerprint,
            adapter=adapter,
            adapter_fingerprint=adapter_fingerprint,
            tokenizer_fingerprint=info.tokenizer_fingerprint,
            tokenizer_size=info.tokenizer_size,
            vocab_size=info.vocab_size,
            top_k=config.top_k,
            logprob_dtype="float32" if full else "float16",
            temperatures=tuple(config.temperatures),
            entropy=config.entropy,
            sampling=_sampling(config),
        )

    def for_config(self, config: DistributionConfig) -> CacheMeta:
        """What the same teacher would answer to `config`, on the wire that these answers came by."""
        return replace(
            self,
            top_k=config.top_k,
            temperatures=tuple(config.temperatures),
            entropy=config.entropy,
            sampling=_sampling(config),
        )

    def key(
        self,
        token_ids: NDArray[np.int32],
        start: int,
        query_token_ids: NDArray[np.int32] | None = None,
    ) -> str:
        """The address of an answer: SHA-256 over the tokens, `start` and all that decides it, as 64 hex digits.

        `temperatures` and `entropy` are left out: they add columns and change none. So an answer with more of them
        serves whoever needs less.
        """
        decided_by = [
            FORMAT,
            self.teacher_fingerprint,
            self.adapter_fingerprint,
            self.top_k,
            self.logprob_dtype,
            self.sampling,
            int(start),
            len(token_ids),
            None if query_token_ids is None else list(query_token_ids.shape),
        ]
        digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(token_ids, "<i4").tobytes())
        if query_token_ids is not None:
            digest.update(np.ascontiguousarray(query_token_ids, "<i4").tobytes())
        return digest.hexdigest()

    def same_teacher(self, other: CacheMeta) -> bool:
        """Whether both are of one teacher with one adapter."""
        return (self.teacher_fingerprint, self.adapter_fingerprint) == (
            other.teacher_fingerprint,
            other.adapter_fingerprint,
        )

    def shared_with(self, tokenizer_fingerprint: str) -> int:
        """Ids below it mean the same to a student with this tokenizer as to the teacher; 0 if that is not known."""
        if tokenizer_fingerprint == self.tokenizer_fingerprint:
            return self.tokenizer_size
        return self.shared_size if tokenizer_fingerprint == self.student_tokenizer_fingerprint else 0

    def serves(self, asked: CacheMeta) -> bool:
        """Whether answers of this kind hold every column that `asked` needs, given equal keys."""
        return set(asked.temperatures) <= set(self.temperatures) and self.entropy >= asked.entropy

    def to_json(self, codec: Codec) -> bytes:
        """The description as it stands in a shard's footer."""
        return json.dumps({"format": FORMAT, "codec": codec, **asdict(self)}, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> tuple[CacheMeta, Codec]:
        """Description and codec out of a footer.

        Raises:
            ValueError: it is no description, or one of a later version.
        """
        if len(data) > MAX_META_BYTES:
            raise ValueError(f"its description has {len(data)} bytes; at most {MAX_META_BYTES} are read")
        values = json.loads(data)
        if not isinstance(values, dict):
            raise ValueError("its description is no JSON object")  # noqa: TRY004 - of a file, not of a caller
        if values.get("format") != FORMAT:
            raise ValueError(
                f"it has format {str(values.get('format'))[:20]!r}, and this version of Stillhouse reads {FORMAT}"
            )
        codec = values.get("codec")
        if codec not in CODECS:
            raise ValueError(f"it has codec {str(codec)[:20]!r}; known are {', '.join(CODECS)}")
        return cls(**_checked(values)), codec


def _sampling(config: DistributionConfig) -> dict[str, Any] | None:
    """What decides an answer beside top_k and logprob_dtype, as JSON; a field that is added to the message counts."""
    rest = DistributionConfig()
    rest.CopyFrom(config)
    for name in ("top_k", "logprob_dtype", "pack_token_ids", "temperatures", "entropy"):
        rest.ClearField(name)
    if not rest.num_sampled_tokens:
        rest.ClearField("seed")
    return json_format.MessageToDict(rest, preserving_proto_field_name=True) or None


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a CacheMeta from JSON; raises ValueError for what cannot be."""
    checked: dict[str, Any] = {}
    for name in _TEXTS:
        text = values.get(name)
        if not isinstance(text, str) or len(text) > _NAME_CHARACTERS or not text.isprintable():
            raise ValueError(f"its {name} is no printable text")
        checked[name] = text
    for name in ("tokenizer_size", "vocab_size", "shared_size", "top_k"):
        number = values.get(name)
        if type(number) is not int or not 0 <= number <= _MAX_COUNT:
            raise ValueError(f"its {name} is no number in [0, {_MAX_COUNT}]")
        checked[name] = number
    checked["logprob_dtype"] = values.get("logprob_dtype")
    if checked["logprob_dtype"] not in ("float16", "float32"):
        raise ValueError("its logprob_dtype is neither float16 nor float32")
    temperatures = values.get("temperatures")
    if not isinstance(temperatures, list) or not all(
        type(each) in (int, float) and each > 0 for each in temperatures
    ):
        raise ValueError("its temperatures are no list of positive numbers")
    checked["temperatures"] = tuple(float(each) for each in temperatures)
    for name in ("entropy", "held_out"):
        if type(values.get(name)) is not bool:
            raise ValueError(f"its {name} is neither true nor false")
        checked[name] = values[name]
    sampling = values.get("sampling")
    if not (sampling is None or isinstance(sampling, dict)):
        raise ValueError("its sampling is no JSON object")
    checked["sampling"] = sampling
    return checked


def invalid_cache(path: object, why: str, remedy: str) -> StillhouseError:
    """The error for a file that is no shard, or a damaged one."""
    return StillhouseError(
        Reason.CACHE_INVALID, f"{path} is damaged or no shard of a cache: {why}. {remedy}", resource=str(path)
    )
