"""Validation of Score requests, and their conversion to the engine's types."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor, TokenDistributions
from stillhouse.protos.tensors import differences, falling_rows
from stillhouse.protos.tensors.distributions import (
    MAX_COLUMNS,
    MAX_STATES_BYTES,
    Distributions,
    decode,
    encode_distributions,
    packed_bits,
)
from stillhouse.protos.tensors.sorted_rows import COMPILED_BITS, PackBlock
from stillhouse.teacher_service.engine import DistributionOptions, EngineInfo, Int32Array, ScoreInput

MAX_TEMPERATURES = 16
MAX_SAMPLED_TOKENS = 512
MIN_LOGPROB_BITS, MAX_LOGPROB_BITS = 2, 16
_OPTIONAL = {
    teacher_pb2.CAPABILITY_LOG_PARTITIONS: "log_partitions",
    teacher_pb2.CAPABILITY_QUERY_LOGPROBS: "query_logprobs",
    teacher_pb2.CAPABILITY_SAMPLED_TOKENS: "sampled_token_ids",
    teacher_pb2.CAPABILITY_ENTROPY: "entropy",
    teacher_pb2.CAPABILITY_HIDDEN_STATES: "hidden_states",
    teacher_pb2.CAPABILITY_TAIL_SAMPLES: "sample_tail, sample_temperature or sampled_logprobs",
    teacher_pb2.CAPABILITY_STRATIFIED_SAMPLES: "stratified_samples, sort_samples or sampled_logprob_bits",
    teacher_pb2.CAPABILITY_LAYER_STATES: "layer_states",
}
_LOGPROB_DTYPES = (Tensor.DATA_TYPE_FLOAT16, Tensor.DATA_TYPE_FLOAT32, Tensor.DATA_TYPE_FALLING)
_QUERIES = (Tensor.DATA_TYPE_INT32, Tensor.DATA_TYPE_DIFFERENCES)
_OF_CLASSES = frozenset({"classes", "hidden_layers", "logprob_dtype", "pack_token_ids"})
"""Fields of a DistributionConfig that may be set with classes; the last two change nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WireFormat:
    """Encoding of distributions in one call."""

    logprob_dtype: Tensor.DataType.ValueType
    pack_bits: int | None
    sort_bits: int | None = None
    sampled_logprob_bits: int = 0

    def encode(self, rows: Distributions, queried_ids: Int32Array | None = None) -> TokenDistributions:
        """Encodes rows as a message; `queried_ids` [T, Q] came as DIFFERENCES."""
        return encode_distributions(
            rows,
            logprob_dtype=self.logprob_dtype,
            pack_bits=self.pack_bits,
            sort_bits=self.sort_bits,
            sampled_logprob_bits=self.sampled_logprob_bits,
            pack_block=_compiled_packing() if (self.sort_bits or 0) >= COMPILED_BITS else None,
            queried_ids=queried_ids,
        )


def all_capabilities(info: EngineInfo) -> frozenset[int]:
    """The capabilities of an engine, and of this service for every engine of its kind."""
    if info.class_names:
        return info.capabilities
    further = {teacher_pb2.CAPABILITY_COMPACT_LOGPROBS}
    if teacher_pb2.CAPABILITY_QUERY_LOGPROBS in info.capabilities and differences.are_coded():
        further.add(teacher_pb2.CAPABILITY_CODED_QUERIES)
    return info.capabilities | further


def prepare_encoding(info: EngineInfo) -> None:
    """Loads compiled code that `WireFormat.encode` needs for an engine; the first time in a process it may take seconds."""
    if info.class_names:
        return
    falling_rows.prepare()
    differences.prepare()
    bits = packed_bits(info.vocab_size)
    pack_block = _compiled_packing() if bits >= COMPILED_BITS else None
    if pack_block is not None:
        pack_block(np.zeros((1, 1), np.int32), bits)


def _compiled_packing() -> PackBlock | None:
    """None without numba, as where a teacher's model is another server's."""
    try:
        from stillhouse.teacher_service.distributions.sorted_rows_numba import pack_block
    except ImportError:
        return None

    return pack_block


def require(info: EngineInfo, capability: teacher_pb2.Capability.ValueType) -> None:
    """Raises `StillhouseError` with CAPABILITY where the engine lacks it."""
    if capability in info.capabilities:
        return
    metadata = {"capability": teacher_pb2.Capability.Name(capability)}
    if info.class_names and capability != teacher_pb2.CAPABILITY_LAYER_STATES:
        sentence = f"This teacher ({info.model}) is a classifier, which gives classes and takes no adapters. Leave them out."
    elif capability == teacher_pb2.CAPABILITY_HOT_ADAPTERS and info.upstream:
        sentence = "This teacher's model is another server's, which loads adapters itself. Load it there, and start the teacher again."
    elif capability == teacher_pb2.CAPABILITY_HOT_ADAPTERS:
        sentence = "This teacher serves the base model only. Start it with --max-adapters above 0."
    else:
        metadata["engine"] = "hf"
        sentence = (
            f"This teacher's engine ({info.engine}) has no {_OPTIONAL[capability]}. The hf engine has: start the teacher with "
            "--engine hf, or do not request it."
        )
    raise StillhouseError(Reason.CAPABILITY, sentence, metadata=metadata)


def check_distributions(
    config: teacher_pb2.DistributionConfig, info: EngineInfo
) -> tuple[DistributionOptions, WireFormat]:
    """Validates the config of a call; returns the quantities to report and their encoding.

    Raises `StillhouseError`: TOP_K_TOO_LARGE, INVALID_REQUEST, CAPABILITY.
    """
    if config.classes:
        return _check_classes(config, info)
    require_text(info)
    if config.top_k < 0:
        raise invalid_request(f"top_k is {config.top_k}. Give a number in [0, {info.max_top_k}].")
    if config.top_k > info.max_top_k:
        raise StillhouseError(
            Reason.TOP_K_TOO_LARGE,
            f"top_k is {config.top_k}; this teacher gives at most {info.max_top_k}. Lower it"
            + (f", or start the teacher with --max-top-k {config.top_k}." if config.top_k <= 256 else "."),
            metadata={"top_k": str(config.top_k), "max_top_k": str(info.max_top_k)},
        )
    dtype = config.logprob_dtype or Tensor.DATA_TYPE_FLOAT16
    if dtype not in _LOGPROB_DTYPES:
        raise invalid_request(
            f"logprob_dtype is {dtype}. Log-probabilities travel as FLOAT16, FLOAT32 or FALLING."
        )
    if len(config.temperatures) > MAX_TEMPERATURES:
        raise invalid_request(
            f"{len(config.temperatures)} temperatures are requested; the limit is {MAX_TEMPERATURES}. Send fewer."
        )
    for temperature in config.temperatures:
        if not (math.isfinite(temperature) and temperature > 0):
            raise invalid_request(f"A temperature is {temperature}. Each must be a finite number above 0.")
    if not 0 <= config.num_sampled_tokens <= MAX_SAMPLED_TOKENS:
        raise invalid_request(
            f"num_sampled_tokens is {config.num_sampled_tokens}. Give a number in [0, {MAX_SAMPLED_TOKENS}]."
        )
    if not (math.isfinite(config.sample_temperature) and config.sample_temperature >= 0):
        raise invalid_request(
            f"sample_temperature is {config.sample_temperature}. Give a finite number above 0, or 0 for 1."
        )
    logprob_bits = config.sampled_logprob_bits
    if logprob_bits and not MIN_LOGPROB_BITS <= logprob_bits <= MAX_LOGPROB_BITS:
        raise invalid_request(
            f"sampled_logprob_bits is {logprob_bits}. Give a number in [{MIN_LOGPROB_BITS}, {MAX_LOGPROB_BITS}], or 0 for "
            "logprob_dtype."
        )
    temperature = config.sample_temperature or 1.0
    for requested, capability in (
        (bool(config.temperatures), teacher_pb2.CAPABILITY_LOG_PARTITIONS),
        (config.num_sampled_tokens > 0, teacher_pb2.CAPABILITY_SAMPLED_TOKENS),
        (config.entropy, teacher_pb2.CAPABILITY_ENTROPY),
        (config.hidden_states, teacher_pb2.CAPABILITY_HIDDEN_STATES),
        (
            config.sample_tail or temperature != 1 or config.sampled_logprobs,
            teacher_pb2.CAPABILITY_TAIL_SAMPLES,
        ),
        (
            config.stratified_samples or config.sort_samples or logprob_bits > 0,
            teacher_pb2.CAPABILITY_STRATIFIED_SAMPLES,
        ),
    ):
        if requested:
            require(info, capability)
    options = DistributionOptions(
        top_k=config.top_k,
        temperatures=tuple(config.temperatures),
        num_sampled_tokens=config.num_sampled_tokens,
        seed=config.seed,
        entropy=config.entropy,
        hidden_states=config.hidden_states,
        sample_tail=config.sample_tail,
        sample_temperature=temperature,
        sampled_logprobs=config.sampled_logprobs,
        stratified_samples=config.stratified_samples,
        hidden_layers=_check_layers(config, info),
        half_logprobs=dtype == Tensor.DATA_TYPE_FLOAT16,
    )
    bits = packed_bits(info.vocab_size)
    return options, WireFormat(
        logprob_dtype=dtype,
        pack_bits=bits if config.pack_token_ids else None,
        sort_bits=bits if config.sort_samples else None,
        sampled_logprob_bits=logprob_bits,
    )


def require_scores(info: EngineInfo) -> None:
    """Raises `StillhouseError` with CAPABILITY for a teacher that only generates."""
    if teacher_pb2.CAPABILITY_GENERATION_ONLY in info.capabilities:
        raise StillhouseError(
            Reason.CAPABILITY,
            f"This teacher ({info.model}, {info.engine}) generates and does not score: its server reports no log-probabilities of "
            "given text. Capture what it generates (`stillhouse generate --capture`), or use a teacher started with --engine vllm "
            "or --engine hf.",
            metadata={"capability": "CAPABILITY_GENERATION_ONLY"},
        )


def require_text(info: EngineInfo) -> None:
    """Raises `StillhouseError` with CAPABILITY for a classifier, which knows no distributions over tokens."""
    if info.class_names:
        raise StillhouseError(
            Reason.CAPABILITY,
            f"This teacher ({info.model}) is a classifier: it scores whole sequences over {len(info.class_names)} classes and "
            "writes no text. Request classes (in a run, task: sequence_classification), or serve a language model.",
            metadata={"capability": "CAPABILITY_CLASSES"},
        )


def _check_classes(
    config: teacher_pb2.DistributionConfig, info: EngineInfo
) -> tuple[DistributionOptions, WireFormat]:
    if not info.class_names:
        raise StillhouseError(
            Reason.CAPABILITY,
            f"This teacher ({info.model}) is a language model, which has no classes. Serve a sequence classifier with "
            "--engine hf, or do not request classes.",
            metadata={"capability": "CAPABILITY_CLASSES"},
        )
    others = [field.name for field, _ in config.ListFields() if field.name not in _OF_CLASSES]
    if others:
        raise invalid_request(
            f"classes goes alone, and {others[0]} is requested too, which is for language models. Leave it out."
        )
    wire = WireFormat(logprob_dtype=Tensor.DATA_TYPE_FLOAT32, pack_bits=None)
    return DistributionOptions(top_k=0, classes=True, hidden_layers=_check_layers(config, info)), wire


def _check_layers(config: teacher_pb2.DistributionConfig, info: EngineInfo) -> tuple[int, ...]:
    layers = tuple(config.hidden_layers)
    if not layers:
        return ()
    require(info, teacher_pb2.CAPABILITY_LAYER_STATES)
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > info.num_layers:
        raise invalid_request(
            f"hidden_layers are {list(layers[:20])}. Give ascending numbers in [0, {info.num_layers}], each once."
        )
    most = MAX_COLUMNS // info.hidden_size
    if len(layers) > most:
        raise invalid_request(
            f"hidden_layers are {len(layers)} of {info.hidden_size} units each; {MAX_COLUMNS} units of all together is the limit. "
            f"Request at most {most}."
        )
    return layers


def _check_states(options: DistributionOptions, num_rows: int, info: EngineInfo) -> None:
    row_bytes = 4 * len(options.hidden_layers) * info.hidden_size
    if num_rows * row_bytes > MAX_STATES_BYTES:
        raise invalid_request(
            f"The states of {num_rows} positions after {len(options.hidden_layers)} layers take {num_rows * row_bytes} bytes; "
            f"{MAX_STATES_BYTES} of a sequence is the limit. Request fewer layers, or send {MAX_STATES_BYTES // row_bytes} "
            "positions at most."
        )


def check_tokens(tensor: Tensor, info: EngineInfo, *, longest: int) -> Int32Array:
    """Validates a sequence of 1 to `longest` tokens; returns its ids.

    Raises `StillhouseError`: EMPTY_SEQUENCE, SEQUENCE_TOO_LONG, TOKEN_OUT_OF_RANGE, TENSOR_INVALID.
    """
    # Length first: a sequence that is too long is reported as such, whatever else is wrong with it.
    if len(tensor.shape) == 1:
        check_length(tensor.shape[0], longest)
    ids: Int32Array = decode(tensor, field="token_ids", dtypes=(Tensor.DATA_TYPE_INT32,), shape=(None,))
    outside = np.flatnonzero((ids < 0) | (ids >= info.tokenizer_size))
    if outside.size:
        index = int(outside[0])
        raise StillhouseError(
            Reason.TOKEN_OUT_OF_RANGE,
            f"token_ids[{index}] is {ids[index]}; this teacher's tokenizer has ids in [0, {info.tokenizer_size}). "
            "Tokenise with the teacher's own tokenizer (GetTokenizer).",
            metadata={"index": str(index), "token_id": str(ids[index]), "limit": str(info.tokenizer_size)},
        )
    return ids


def check_length(length: int, longest: int) -> None:
    """Raises `StillhouseError` with EMPTY_SEQUENCE or SEQUENCE_TOO_LONG."""
    if length == 0:
        raise StillhouseError(Reason.EMPTY_SEQUENCE, "The sequence has no tokens. Send at least one.")
    if length > longest:
        raise StillhouseError(
            Reason.SEQUENCE_TOO_LONG,
            f"The sequence has {length} tokens; this teacher takes at most {longest}. Shorten it, or start the teacher "
            "with a larger --max-sequence-tokens where the model allows.",
            metadata={"length": str(length), "limit": str(longest)},
        )


def check_sequence(
    sequence: teacher_pb2.ScoreSequence, options: DistributionOptions, info: EngineInfo
) -> ScoreInput:
    """Validates one sequence to score. Raises `StillhouseError` as `check_tokens`, and INVALID_REQUEST, CAPABILITY."""
    ids = check_tokens(sequence.token_ids, info, longest=info.max_sequence_tokens)
    if len(ids) < 2:
        raise StillhouseError(
            Reason.EMPTY_SEQUENCE,
            "The sequence has 1 token, and the first token of a sequence is predicted by nothing. Send at least 2.",
        )
    if options.classes:
        return _check_classified(sequence, ids, options, info)
    if sequence.HasField("token_type_ids"):
        raise invalid_request("token_type_ids are for classes alone. Leave them out.")
    start = sequence.start or 1
    if not 1 <= start < len(ids):
        raise invalid_request(
            f"start is {start}; a sequence of {len(ids)} tokens can be scored from 1 to {len(ids) - 1}."
        )
    _check_states(options, len(ids) - start, info)
    query = None
    if sequence.HasField("query_token_ids"):
        query = _check_query(sequence.query_token_ids, len(ids) - start, info)
    return ScoreInput(
        token_ids=ids, start=start, adapter=sequence.adapter, query_token_ids=query, options=options
    )


def _check_classified(
    sequence: teacher_pb2.ScoreSequence, ids: Int32Array, options: DistributionOptions, info: EngineInfo
) -> ScoreInput:
    if sequence.start or sequence.HasField("query_token_ids"):
        raise invalid_request(
            "start or query_token_ids is set, and classes are those of the whole sequence. Leave both out."
        )
    _check_states(options, len(ids), info)
    types: Int32Array | None = None
    if sequence.HasField("token_type_ids"):
        types = decode(
            sequence.token_type_ids,
            field="token_type_ids",
            dtypes=(Tensor.DATA_TYPE_INT32,),
            shape=(len(ids),),
        )
        limit = max(1, info.num_token_types)
        if not (types.min() >= 0 and types.max() < limit):
            raise invalid_request(
                f"token_type_ids reach from {types.min()} to {types.max()}; this teacher has types in [0, {limit})."
            )
    return ScoreInput(
        token_ids=ids, start=len(ids) - 1, adapter=sequence.adapter, token_type_ids=types, options=options
    )


def _check_query(tensor: Tensor, num_rows: int, info: EngineInfo) -> Int32Array:
    require(info, teacher_pb2.CAPABILITY_QUERY_LOGPROBS)
    width = tensor.shape[1] if len(tensor.shape) == 2 else 0
    if width > info.max_query_tokens:
        raise invalid_request(
            f"query_token_ids has {width} ids per position; this teacher takes {info.max_query_tokens}."
        )
    ids: Int32Array = decode(tensor, field="query_token_ids", dtypes=_QUERIES, shape=(num_rows, None))
    if ids.size and not (ids.min() >= -1 and ids.max() < info.vocab_size):
        row, column = np.argwhere((ids < -1) | (ids >= info.vocab_size))[0]
        raise StillhouseError(
            Reason.TOKEN_OUT_OF_RANGE,
            f"query_token_ids[{row}, {column}] is {ids[row, column]}; this model has ids in [0, {info.vocab_size}), and -1 "
            "stands for none.",
            metadata={"index": f"{row},{column}", "limit": str(info.vocab_size)},
        )
    return ids


def invalid_request(sentence: str) -> StillhouseError:
    """Builds an error with INVALID_REQUEST."""
    return StillhouseError(Reason.INVALID_REQUEST, sentence)
