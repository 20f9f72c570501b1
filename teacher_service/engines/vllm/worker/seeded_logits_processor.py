"""Seeded sampling on vLLM's CPU build: samples a token from seed and position alone, and lets vLLM take the argmax.

vLLM's own seeds are unusable there: a prompt read in several steps makes its worker rewind the seeded generator,
which CPU generators cannot do, and the engine dies. Runs in vLLM's worker process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams, envs
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

from stillhouse.teacher_service.distributions.sampling import sample_token
from stillhouse.teacher_service.engine import GenerateInput

NAME = f"{__name__}:SeededSampling"
"""Import path of the class below for vLLM's `logits_processors`."""
_KEY = "stillhouse_draw"


def is_used() -> bool:
    """True on a CPU with vLLM's first model runner; the second takes no processor of this kind."""
    return bool(current_platform.is_cpu()) and not envs.VLLM_USE_V2_MODEL_RUNNER


def sampling_argument(item: GenerateInput, *, num_valid: int) -> dict[str, Any]:
    """`SamplingParams.extra_args` of a greedy request whose tokens are sampled as `item` says."""
    assert item.seed is not None
    return {
        _KEY: {
            "seed": item.seed & (2**64 - 1),
            "temperature": item.temperature,
            "top_p": item.top_p,
            "top_k": item.top_k,
            "num_valid": num_valid,
        }
    }


class SeededSampling(AdapterLogitsProcessor):  # type: ignore[misc]
    """Leaves one token in the rows of requests with a seed; vLLM reports their logprobs from before this."""

    def is_argmax_invariant(self) -> bool:
        """Returns False: the processor decides the argmax."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        """Sampler of one request; None without a seed."""
        argument = (params.extra_args or {}).get(_KEY)
        return None if argument is None else _RequestSampler(**argument)


class _RequestSampler:
    def __init__(self, *, seed: int, **sampling: Any) -> None:
        self._seed = seed
        self._sampling = sampling

    def __call__(self, output_ids: list[int], logits_V: Tensor) -> Tensor:
        if not bool(torch.isfinite(logits_V.max())):
            return logits_V  # the engine detects this in the logprobs
        position = np.random.SeedSequence((self._seed, len(output_ids)))
        generator = torch.Generator().manual_seed(int(position.generate_state(1, np.uint64)[0] >> 1))
        token, _ = sample_token(logits_V, **self._sampling, generator=generator)
        chosen_V = torch.full_like(logits_V, -torch.inf)
        chosen_V[token] = 0.0
        return chosen_V
