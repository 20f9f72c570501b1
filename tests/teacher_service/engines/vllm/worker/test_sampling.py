"""Rows of samples from vLLM's first model runner, computed by helper threads beside later steps: the parts that need no model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

from stillhouse.teacher_service.engine import DistributionOptions
from stillhouse.teacher_service.engines.vllm.worker.cpu_threads import HelperThreads
from stillhouse.teacher_service.engines.vllm.worker.extension import get_plan
from stillhouse.teacher_service.engines.vllm.worker.request_plan import STREAM_INTERVAL_TOKENS, SamplingPlan
from stillhouse.teacher_service.engines.vllm.worker.sampling import sampler

VOCAB_SIZE = 2200
MAX_TOKENS = 40
NUM_STEPS = 60
OPTIONS = (
    DistributionOptions(top_k=8),
    DistributionOptions(top_k=3, num_sampled_tokens=5, temperatures=(2.0,)),
    None,
)


def request(number: int) -> Any:
    plan = SamplingPlan(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        seed=number,
        num_valid=VOCAB_SIZE,
        options=OPTIONS[number % len(OPTIONS)],
    )
    params = SimpleNamespace(
        extra_args=plan.to_extra_args(), max_tokens=MAX_TOKENS, stop_token_ids=[7], eos_token_id=None
    )
    return SimpleNamespace(
        sampling_params=params,
        prompt_token_ids=[1, 2, number],
        num_prompt_tokens=3,
        output_token_ids=[],
        begins=number % 5,
    )


def blocks_of(num_helpers: int, dtype: torch.dtype) -> dict[str, list[tuple[list[int], bytes, bytes]]]:
    """Every block of rows that leaves, by request, with the tokens of the request until then."""
    requests = {str(number): request(number) for number in range(12)}
    runner = SimpleNamespace(
        requests=requests,
        device=torch.device("cpu"),
        max_model_len=200,
        input_batch=SimpleNamespace(),
        discard_request_mask=SimpleNamespace(),
    )
    sample = sampler(runner, None, get_plan, HelperThreads(num_helpers))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[tuple[list[int], bytes, bytes]]] = {name: [] for name in requests}
    with torch.inference_mode():
        for step in range(NUM_STEPS):
            logits_AV = (torch.randn(len(requests), VOCAB_SIZE, generator=generator) * 3).to(dtype)
            present = [
                name
                for name, each in requests.items()
                if each.begins <= step and len(each.output_token_ids) < MAX_TOKENS
            ]
            if not present:
                break
            runner.input_batch.req_ids = present
            runner.discard_request_mask.np = np.zeros(len(present), bool)
            output = sample(logits_AV[[int(name) for name in present]], None)
            for row, name in enumerate(present):
                requests[name].output_token_ids.append(int(output.sampled_token_ids[row, 0]))
                block = output.logprobs_tensors.slice_request(row, 1)
                if block is not None:
                    ids, values = block[:2]
                    tokens = requests[name].output_token_ids[-len(ids) :]
                    assert ids[:, 0].tolist() == tokens
                    found[name].append((list(tokens), ids.tobytes(), values.tobytes()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deferred_rows_are_those_of_their_own_step(dtype: torch.dtype) -> None:
    found = blocks_of(1, dtype)
    assert found == blocks_of(0, dtype)
    lengths = [[len(tokens) for tokens, _, _ in blocks] for blocks in found.values()]
    rest = MAX_TOKENS - 1 - 2 * STREAM_INTERVAL_TOKENS
    assert lengths.count([1, STREAM_INTERVAL_TOKENS, STREAM_INTERVAL_TOKENS, rest]) > len(found) / 2
