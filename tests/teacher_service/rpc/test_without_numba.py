"""A teacher whose model is another server's needs no numba: it prepares, encodes the same bytes, and offers no coded queries."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
if sys.argv[1] == "without":
    sys.modules["numba"] = None  # its import fails
import numpy as np
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import EngineInfo
from stillhouse.teacher_service.rpc.score_validation import WireFormat, all_capabilities, prepare_encoding

info = EngineInfo(
    model="m", revision="", model_fingerprint="", tokenizer_size=32_000, vocab_size=32_000, max_sequence_tokens=64,
    max_top_k=16, max_query_tokens=8, capabilities=frozenset({teacher_pb2.CAPABILITY_QUERY_LOGPROBS}), engine="openai",
    dtype="float32", quantization="", eos_token_ids=(), max_adapters=0,
)
prepare_encoding(info)
generator = np.random.default_rng(0)
logprobs = -np.sort(generator.random((3, 16), np.float32), axis=1) - 3
rows = Distributions(
    start=1, token_ids=generator.integers(0, 32_000, (3, 16), dtype=np.int32), logprobs=logprobs,
    target_logprobs=logprobs[:, 0], log_tail=logprobs[:, 1],
    sampled_token_ids=generator.integers(0, 32_000, (3, 192), dtype=np.int32),
)
wire = WireFormat(logprob_dtype=Tensor.DATA_TYPE_FALLING, pack_bits=15, sort_bits=15)
print(teacher_pb2.CAPABILITY_CODED_QUERIES in all_capabilities(info))
print(wire.encode(rows).SerializeToString(deterministic=True).hex())
"""


def test_without_numba_a_teacher_sends_the_same_bytes_and_reads_no_coded_queries() -> None:
    (has, bytes_with), (lacks, bytes_without) = (_told(each) for each in ("with", "without"))
    assert (has, lacks) == ("True", "False")
    assert bytes_with == bytes_without


def _told(numba: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, numba], check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout.split()
