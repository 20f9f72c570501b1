"""Rows of samples from vLLM's first model runner, computed by helper threads beside later steps: the parts that need no model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from stillhouse.teacher_service.distributions.normalisation import is_compiled
from stillhouse.teacher_service.distributions.row_tensors import RowInputs, row_tensors
from stillhouse.teacher_service.engine import DistributionOptions
from stillhouse.teacher_service.engines.vllm.worker.batch_sampling import SampledRows
from stillhouse.teacher_service.engines.vllm.worker.cpu_threads import HelperThreads
from stillhouse.teacher_service.engines.vllm.worker.extension import get_plan
from stillhouse.teacher_service.engines.vllm.worker.plugin import encode_pending_rows
from stillhouse.teacher_service.engines.vllm.worker.request_plan import (
    STREAM_INTERVAL_TOKENS,
    SamplingPlan,
    pack,
)
from stillhouse.teacher_service.engines.vllm.worker.row_buffer import PendingArray, RowsOfSample, Slab
from stillhouse.teacher_service.engines.vllm.worker.sampled_rows import columns_of
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


Blocks = dict[str, list[tuple[list[int], bytes, bytes]]]


def blocks_of(num_helpers: int, dtype: torch.dtype, *, pending: bool = False) -> Blocks:
    """Every block of rows that leaves, by request, with the tokens of the request until then; `pending` ones as vLLM sends them,
    encoded by another thread."""
    encode_pending_rows()
    requests = {str(number): request(number) for number in range(12)}
    runner = SimpleNamespace(
        requests=requests,
        device=torch.device("cpu"),
        max_model_len=200,
        input_batch=SimpleNamespace(),
        discard_request_mask=SimpleNamespace(),
    )
    sample = sampler(runner, None, get_plan, HelperThreads(num_helpers), pending=pending)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    found: Blocks = {name: [] for name in requests}
    leaving: list[tuple[str, list[int], Any]] = []
    encoder, decoder = MsgpackEncoder(), MsgpackDecoder(LogprobsLists)
    with torch.inference_mode(), ThreadPoolExecutor(1) as sender:
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
                    has_plan = OPTIONS[int(name) % len(OPTIONS)] is not None
                    assert isinstance(block[0], PendingArray) == (pending and has_plan)
                    sent = sender.submit(encoder.encode, block) if pending else block
                    leaving.append((name, list(requests[name].output_token_ids), sent))
    for name, tokens, sent in leaving:
        ids, values = decoder.decode(sent.result())[:2] if pending else sent[:2]
        assert ids[:, 0].tolist() == tokens[-len(ids) :]
        found[name].append((tokens[-len(ids) :], ids.tobytes(), values.tobytes()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deferred_rows_are_those_of_their_own_step(dtype: torch.dtype) -> None:
    found = blocks_of(1, dtype)
    assert found == blocks_of(0, dtype)
    assert found == blocks_of(1, dtype, pending=True)
    lengths = [[len(tokens) for tokens, _, _ in blocks] for blocks in found.values()]
    rest = MAX_TOKENS - 1 - 2 * STREAM_INTERVAL_TOKENS
    assert lengths.count([1, STREAM_INTERVAL_TOKENS, STREAM_INTERVAL_TOKENS, rest]) > len(found) / 2


def test_a_row_that_fails_is_sent_as_none_and_fails_a_later_step() -> None:
    encode_pending_rows()
    helpers = HelperThreads(1)

    def fails() -> Any:
        raise MemoryError("no")

    slab = Slab(capacity=1)
    rows = RowsOfSample(slab)
    slab.expect(helpers.defer(fails))
    block = LogprobsLists(*rows.leave(pending=True))
    sent = MsgpackDecoder(LogprobsLists).decode(MsgpackEncoder().encode(block))
    assert len(sent.logprob_token_ids) == len(sent.logprobs) == 0
    helpers.defer(lambda: 1)
    with pytest.raises(MemoryError, match="no"):
        helpers.defer(lambda: 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "top_k"), [(4096, 64), (2203, 1), (40_000, 130)])
def test_compiled_columns_are_those_of_single_operations(
    dtype: torch.dtype, vocab_size: int, top_k: int
) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits_BV = (torch.randn(70, vocab_size, generator=generator) * 4).to(dtype)
    sampled = SampledRows(
        token_ids=torch.randint(vocab_size, (70,), generator=generator),
        logprobs=-torch.rand(70, generator=generator),
    )
    logits_BV[3, 5], logits_BV[4, 6] = torch.nan, -torch.inf
    options = DistributionOptions(top_k=top_k)
    assert is_compiled(logits_BV, top_k)
    ids, values = columns_of(logits_BV, sampled, options, None)
    rows = row_tensors(logits_BV, options, RowInputs(targets=sampled.token_ids))
    wanted = pack(rows, sampled.token_ids, sampled.logprobs)
    finite = torch.tensor([row not in {3, 4} for row in range(70)])
    assert torch.equal(values[:, 0].isnan(), ~finite)
    assert torch.equal(wanted.values[:, 0].isnan(), ~finite)
    assert torch.equal(ids[finite], wanted.ids[finite])
    assert torch.equal(values[finite], wanted.values[finite])
