"""Counts the ranks of tokens without a compiler on a CPU.

vLLM has this count compiled by torch.compile when the first logprobs are asked for: with a C++ compiler some ten seconds of CPU
at a teacher's first start, and an error without one. The worker's own rows have no ranks; those of the public tier do, in
the trial that chooses the tier, and where it is the one that is chosen.
"""

from __future__ import annotations


def count_eagerly() -> None:
    """Takes vLLM's own function as it is before compilation; the counts are the same."""
    from vllm.v1.sample import sampler

    compiled = sampler.batched_count_greater_than
    sampler.batched_count_greater_than = getattr(compiled, "_torchdynamo_orig_callable", compiled)
