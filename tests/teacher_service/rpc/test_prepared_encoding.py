"""A teacher has the compiled code of its wire formats loaded before it serves, whatever its first caller asks for."""

from __future__ import annotations

import numpy as np

from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors import differences_numba, falling_rows_numba
from stillhouse.protos.tensors.distributions import Distributions, packed_bits
from stillhouse.protos.tensors.layout import decode, encode_differences
from stillhouse.teacher_service.distributions import sorted_rows_numba
from stillhouse.teacher_service.engine import EngineInfo
from stillhouse.teacher_service.rpc.score_validation import WireFormat, prepare_encoding

VOCAB_SIZE = 32_000
LOOPS = (
    falling_rows_numba._write,
    sorted_rows_numba._write_level,
    differences_numba.unpack,
    differences_numba.gather,
)


def test_the_first_answer_finds_its_compiled_code_loaded() -> None:
    info = EngineInfo(
        model="m",
        revision="",
        model_fingerprint="",
        tokenizer_size=VOCAB_SIZE,
        vocab_size=VOCAB_SIZE,
        max_sequence_tokens=64,
        max_top_k=16,
        max_query_tokens=0,
        capabilities=frozenset(),
        engine="hf",
        dtype="float32",
        quantization="",
        eos_token_ids=(),
        max_adapters=0,
    )
    prepare_encoding(info)
    loaded = [len(each.signatures) for each in LOOPS]
    assert all(loaded)
    generator = np.random.default_rng(0)
    logprobs = -np.sort(generator.random((3, 16), np.float32), axis=1) - 3
    rows = Distributions(
        start=1,
        token_ids=generator.integers(0, VOCAB_SIZE, (3, 16), dtype=np.int32),
        logprobs=logprobs,
        target_logprobs=logprobs[:, 0],
        log_tail=logprobs[:, 1],
        query_logprobs=np.broadcast_to(
            logprobs[:, :1], (3, 3)
        ),  # as an engine may give it: not to be written
        sampled_token_ids=np.sort(generator.integers(0, VOCAB_SIZE, (3, 192), dtype=np.int32), axis=1),
    )
    queried = np.array([[3, 7, -1]] * 3, np.int32)
    query = decode(
        encode_differences(queried),
        field="query",
        dtypes=(Tensor.DATA_TYPE_DIFFERENCES,),
        shape=(3, None),
    )
    bits = packed_bits(VOCAB_SIZE)
    wire = WireFormat(logprob_dtype=Tensor.DATA_TYPE_FALLING, pack_bits=bits, sort_bits=bits)
    assert wire.encode(rows, query).query_logprobs.shape == [6]
    assert [len(each.signatures) for each in LOOPS] == loaded
