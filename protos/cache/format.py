"""File format of a cache of teacher outputs: content keys, shard descriptions and row columns.

A cache is a folder of Parquet shards and nothing else, so that pandas, DuckDB and Hugging Face `datasets` read it as it
is. A row is one sequence; every column is plain:

| column | type | what |
|---|---|---|
| key | string | content key, `CacheMeta.key` |
| token_ids | list<int32> | the complete sequence, L ids |
| start | int32 | position that the first of T = L - start distributions predicts |
| top_token_ids, logprobs | list<int32>, list<float> | [T, K], row-major: `reshape(T, -1)` |
| target_logprobs, log_tail | list<float> | [T] |
| log_partitions, sampled_token_ids, query_token_ids, query_logprobs | lists, optional | [T, N], [T, R], [T, Q], [T, Q] |
| sampled_logprobs | list<float>, optional | [T, R] |
| entropy | list<float>, optional | [T] |
| student_prompt_ids | list<int32>, optional | the student's tokens in the place of token_ids[:start], which the teacher alone saw |
| token_type_ids | list<int32>, optional | [L], segments of a pair of texts |

Of a classifier the output is one row at the last token, whose ids are its classes (protos/tensors/classes.py).

Their meaning is defined in protos/stillhouse/v1/tensor.proto. Codec "lossless" keeps every bit of the wire: logprobs
are float16 or float32 as transmitted. Codec "compact" keeps logprobs as float16 with COMPACT_BITS bits of fraction,
and all other values as float16.
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
PROMPTED_FORMAT = 2
"""Version of shards whose token_ids hold a prompt that the student must not read."""
META = b"stillhouse"
"""Key of a shard's own description in its Parquet footer."""
SHARD = re.compile(r"(\d{6,12})-([0-9a-f]{64})\.parquet")
"""File name of a shard: its number and the SHA-256 of its bytes."""
COMPACT_BITS = 5
"""Bits of fraction that codec "compact" keeps of a logprob: a relative error of at most 1.6 %."""
MAX_META_BYTES = 64 * 1024
"""Limit on the size of a shard's description."""

Codec = Literal["lossless", "compact"]
CODECS: tuple[Codec, ...] = ("lossless", "compact")
LOGPROB_DTYPES = ("float16", "float32", "compact")
_DTYPE_NAMES = {Tensor.DATA_TYPE_FLOAT32: "float32", Tensor.DATA_TYPE_FALLING: "compact"}
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
    "template_date",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheMeta:
    """Metadata shared by all outputs of a shard: the teacher and the requested distributions."""

    model: str
    """Model name as the teacher reports it, for display."""
    teacher_fingerprint: str
    """GetTeacherInfoResponse.model_fingerprint."""
    adapter: str = ""
    """Name of the adapter, for display; empty for the base model."""
    adapter_fingerprint: str = ""
    """Empty for the base model."""
    tokenizer_fingerprint: str
    """Fingerprint of the teacher's tokenizer."""
    tokenizer_size: int
    """Number of tokens in the tokenizer."""
    vocab_size: int
    """Rows of the teacher's output layer: every id is below it."""
    top_k: int
    """Requested top-k, K; smaller only where the vocabulary is."""
    logprob_dtype: str = "float16"
    """Type of the logprobs on the wire: "float16", "float32", or "compact" for FALLING, whose numbers are float16 ones."""
    temperatures: tuple[float, ...] = ()
    """Temperatures of the columns of log_partitions, in this order."""
    entropy: bool = False
    """True if the entropy column is present."""
    sampling: Mapping[str, Any] | None = None
    """All other request settings that determine the output, such as number and seed of samples."""
    held_out: bool = False
    """True if the text is held out for evaluation and must not be trained on."""
    name: str = ""
    """Name of the teacher in the run that requested it; empty if the run has a single teacher."""
    student_tokenizer_fingerprint: str = ""
    """Fingerprint of the student's tokenizer, if it differs from the teacher's but is compatible."""
    shared_size: int = 0
    """Ids below it stand for the same tokens in both tokenizers; 0 without such a student."""
    template_date: str = ""
    """Day that the chat template wrote into the text, such as 2025-01-31; empty if it wrote none."""
    prompted: bool = False
    """True if token_ids begin with a prompt that the teacher alone saw; the student's is in student_prompt_ids."""
    class_names: tuple[str, ...] = ()
    """Names of a classifier's classes, by id; empty for a language model."""

    @classmethod
    def from_config(
        cls,
        info: GetTeacherInfoResponse,
        config: DistributionConfig,
        *,
        adapter: str = "",
        adapter_fingerprint: str = "",
    ) -> CacheMeta:
        """Metadata of a teacher's outputs for `config`, from its base model if there is no adapter."""
        return cls(
            model=info.model,
            teacher_fingerprint=info.model_fingerprint,
            adapter=adapter,
            adapter_fingerprint=adapter_fingerprint,
            tokenizer_fingerprint=info.tokenizer_fingerprint,
            tokenizer_size=info.tokenizer_size,
            vocab_size=info.vocab_size,
            top_k=len(info.class_names) if config.classes else config.top_k,
            logprob_dtype=_DTYPE_NAMES.get(config.logprob_dtype, "float16"),
            temperatures=tuple(config.temperatures),
            entropy=config.entropy,
            sampling=_sampling(config),
            class_names=tuple(info.class_names),
        )

    def for_config(self, config: DistributionConfig) -> CacheMeta:
        """Metadata of the same teacher's outputs for `config`, with the same logprob type."""
        return replace(
            self,
            top_k=len(self.class_names) if config.classes else config.top_k,
            temperatures=tuple(config.temperatures),
            entropy=config.entropy,
            sampling=_sampling(config),
        )

    def key(
        self,
        token_ids: NDArray[np.int32],
        start: int,
        query_token_ids: NDArray[np.int32] | None = None,
        token_type_ids: NDArray[np.int32] | None = None,
    ) -> str:
        """The content key of an output: SHA-256 over tokens, `start` and all settings that determine it, in hex.

        `temperatures` and `entropy` are left out: they add columns and change none, so an output with more of them
        serves a request for fewer.
        """
        determined_by = [
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
        digest = hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(token_ids, "<i4").tobytes())
        if query_token_ids is not None:
            digest.update(np.ascontiguousarray(query_token_ids, "<i4").tobytes())
        if token_type_ids is not None:
            digest.update(np.ascontiguousarray(token_type_ids, "<i4").tobytes())
        return digest.hexdigest()

    def same_teacher(self, other: CacheMeta) -> bool:
        """True if both come from the same teacher and adapter."""
        return (self.teacher_fingerprint, self.adapter_fingerprint) == (
            other.teacher_fingerprint,
            other.adapter_fingerprint,
        )

    def shared_with(self, tokenizer_fingerprint: str) -> int:
        """Ids below it stand for the same tokens in this student's tokenizer and the teacher's; 0 if unknown."""
        if tokenizer_fingerprint == self.tokenizer_fingerprint:
            return self.tokenizer_size
        return self.shared_size if tokenizer_fingerprint == self.student_tokenizer_fingerprint else 0

    def serves(self, asked: CacheMeta) -> bool:
        """True if outputs with this metadata hold every column that `asked` needs, given equal keys."""
        return set(asked.temperatures) <= set(self.temperatures) and self.entropy >= asked.entropy

    def to_json(self, codec: Codec) -> bytes:
        """The metadata as JSON for a shard's footer."""
        values = asdict(self)
        if not values.pop("prompted"):
            return json.dumps({"format": FORMAT, "codec": codec, **values}, sort_keys=True).encode()
        return json.dumps({"format": PROMPTED_FORMAT, "codec": codec, **values}, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> tuple[CacheMeta, Codec]:
        """Metadata and codec from a footer.

        Raises:
            ValueError: it is malformed, or of a later version.
        """
        if len(data) > MAX_META_BYTES:
            raise ValueError(f"its description has {len(data)} bytes; at most {MAX_META_BYTES} are read")
        values = json.loads(data)
        if not isinstance(values, dict):
            raise ValueError("its description is not a JSON object")  # noqa: TRY004 - a file is wrong, not a caller
        if values.get("format") not in (FORMAT, PROMPTED_FORMAT):
            raise ValueError(
                f"it has format {str(values.get('format'))[:20]!r}, and this version of Stillhouse reads {FORMAT} and "
                f"{PROMPTED_FORMAT}"
            )
        codec = values.get("codec")
        if codec not in CODECS:
            raise ValueError(f"it has codec {str(codec)[:20]!r}; expected one of {', '.join(CODECS)}")
        return cls(**_checked(values), prompted=values["format"] == PROMPTED_FORMAT), codec


def _sampling(config: DistributionConfig) -> dict[str, Any] | None:
    """All that determines an output besides top_k and logprob_dtype, as JSON; fields added to the message later count."""
    rest = DistributionConfig()
    rest.CopyFrom(config)
    for name in ("top_k", "logprob_dtype", "pack_token_ids", "sort_samples", "temperatures", "entropy"):
        rest.ClearField(name)
    if not rest.num_sampled_tokens:
        for of_draws in ("seed", "sample_tail", "sample_temperature", "sampled_logprobs"):
            rest.ClearField(of_draws)
        rest.ClearField("stratified_samples")
    if not (rest.num_sampled_tokens and rest.sampled_logprobs):
        rest.ClearField("sampled_logprob_bits")
    return json_format.MessageToDict(rest, preserving_proto_field_name=True) or None


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a CacheMeta from JSON. Raises ValueError for invalid values."""
    checked: dict[str, Any] = {}
    for name in _TEXTS:
        # Shards of earlier versions have no date.
        text = values.get(name, "" if name == "template_date" else None)
        if not isinstance(text, str) or len(text) > _NAME_CHARACTERS or not text.isprintable():
            raise ValueError(f"its {name} is not printable text")
        checked[name] = text
    for name in ("tokenizer_size", "vocab_size", "shared_size", "top_k"):
        number = values.get(name)
        if type(number) is not int or not 0 <= number <= _MAX_COUNT:
            raise ValueError(f"its {name} is not an integer in [0, {_MAX_COUNT}]")
        checked[name] = number
    checked["logprob_dtype"] = values.get("logprob_dtype")
    if checked["logprob_dtype"] not in LOGPROB_DTYPES:
        raise ValueError(f"its logprob_dtype is none of {', '.join(LOGPROB_DTYPES)}")
    temperatures = values.get("temperatures")
    if not isinstance(temperatures, list) or not all(
        type(each) in (int, float) and each > 0 for each in temperatures
    ):
        raise ValueError("its temperatures are not a list of positive numbers")
    checked["temperatures"] = tuple(float(each) for each in temperatures)
    for name in ("entropy", "held_out"):
        if type(values.get(name)) is not bool:
            raise ValueError(f"its {name} is neither true nor false")
        checked[name] = values[name]
    sampling = values.get("sampling")
    if not (sampling is None or isinstance(sampling, dict)):
        raise ValueError("its sampling is not a JSON object")
    checked["sampling"] = sampling
    names = values.get("class_names", [])  # shards of earlier versions have none
    if not isinstance(names, list) or not all(
        isinstance(each, str) and len(each) <= _NAME_CHARACTERS for each in names
    ):
        raise ValueError("its class_names are not a list of texts")
    checked["class_names"] = tuple(names)
    return checked


def invalid_cache(path: object, why: str, remedy: str) -> StillhouseError:
    """The error for a damaged or foreign file in a cache."""
    return StillhouseError(
        Reason.CACHE_INVALID, f"{path} is damaged or not a cache shard: {why}. {remedy}", resource=str(path)
    )
