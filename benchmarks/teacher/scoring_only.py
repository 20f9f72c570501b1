"""Scoring alone, on the small model: k = 20, 64 and 128 over gRPC, against the engine without logprobs and vLLM's
HTTP server.

The part of `benchmarks.teacher` without peers besides vLLM itself; takes the same options.
"""

from __future__ import annotations

import sys

from benchmarks.teacher.__main__ import main

NAMES = (
    "score_vs_engine_small_k20",
    "score_vs_engine_small_k64",
    "score_vs_engine_small_k128",
    "score_vs_http_small_k20",
    "score_vs_http_k64",
    "score_vs_http_k128",
)

if __name__ == "__main__":
    main(["--models", "small", "--only", ",".join(NAMES), *sys.argv[1:]])
