"""Rows and samples on a device that is not a CPU: nothing may read from it, which would wait for it.

PyTorch's `meta` device has shapes and no numbers, so that every read of a number, and every shape that depends on one, fails.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stillhouse.teacher_service.distributions.row_tensors import RowInputs, row_tensors
from stillhouse.teacher_service.distributions.to_device import to_device
from stillhouse.teacher_service.engine import DistributionOptions
from stillhouse.teacher_service.engines.vllm.worker.request_plan import SamplingPlan, column_counts, pack
from stillhouse.teacher_service.engines.vllm.worker.sampled_rows import sampled_columns

T, V, H = 5, 3000, 8
META = torch.device("meta")
OPTIONS = DistributionOptions(
    top_k=4,
    temperatures=(0.5, 2.0),
    num_sampled_tokens=3,
    entropy=True,
    hidden_states=True,
    sample_tail=True,
    sample_temperature=2.0,
    sampled_logprobs=True,
)


def test_numbers_cannot_be_read_there() -> None:
    with pytest.raises(RuntimeError):
        bool(torch.ones(2, device=META).all())


@pytest.mark.parametrize("stratified", [False, True])
def test_rows_are_computed_without_a_look_at_them(stratified: bool) -> None:
    options = replace(OPTIONS, stratified_samples=stratified)
    inputs = RowInputs(
        targets=to_device(np.zeros(T, np.int64), META),
        queries=to_device(np.zeros((T, 2), np.int64), META),
        uniforms=to_device(np.zeros((T, 3)), META),
        hidden_states=torch.empty(T, H, dtype=torch.bfloat16, device=META),
    )
    logits = torch.empty(T, V, dtype=torch.bfloat16, device=META)
    ids, values, _ = pack(row_tensors(logits, options, inputs), inputs.targets)
    assert (ids.device, ids.dtype, values.dtype) == (META, torch.int32, torch.float32)
    counts = column_counts(options, vocab_size=V, num_queries=2, hidden_size=H)
    assert (ids.shape, values.shape) == ((T, counts[0]), (T, counts[1]))


def test_samples_of_every_kind_are_taken_without_a_look_at_them() -> None:
    options = DistributionOptions(top_k=4, num_sampled_tokens=3)
    kinds = [(0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.9, 0), (0.7, 0.9, 20), (2.0, 1.0, 7)]
    plans = [
        SamplingPlan(
            temperature=temperature, top_p=top_p, top_k=top_k, seed=1, num_valid=V - 3, options=options
        )
        for temperature, top_p, top_k in kinds
    ]
    logits = torch.empty(len(plans), V, device=META)
    ids, values = sampled_columns(logits, plans, [0] * len(plans), np.zeros((len(plans), 3)))
    assert (ids.device, ids.shape, values.shape) == (META, (5, 1 + 4 + 3), (5, 3 + 4))
