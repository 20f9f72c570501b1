"""A process that waits for a run loads the compiled code that the run's steps call."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stillhouse.protos.tensors import exponentials_numba, reverse_kl_numba, sorted_rows, sorted_rows_numba
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.batching import distinct_numba
from stillhouse.student_trainer.train.batching.target_forms import COMPILED_DRAWS, _distinct, target_rows
from stillhouse.student_trainer.train.loss.fused import OutputLayer, fused_objective
from stillhouse.student_trainer.train.loss.logit_chunk import COMPILED_VOCAB
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.setup.first_use import load_first_use
from tests.student_trainer.train.loss.dense_reference import random_logits, targets_of

N, H, V, K = 5, 8, COMPILED_VOCAB, 4
OWN_DRAWS = LossConfig(terms=(LossTermConfig(divergence="reverse_kl"),), sparse_target="student_tail")
LOOPS = (
    exponentials_numba._replace,
    exponentials_numba._replace_by_shares,
    reverse_kl_numba._take,
    reverse_kl_numba._differentiate,
    distinct_numba._count,
    distinct_numba._weigh,
    sorted_rows_numba._read_levels,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_finds_its_compiled_code_loaded(dtype: torch.dtype) -> None:
    load_first_use()
    loaded = [len(each.signatures) for each in LOOPS]
    assert all(loaded)
    weight = random_logits(V, H, seed=1, dtype=dtype).requires_grad_()
    hidden = random_logits(N, H, seed=2, dtype=dtype).requires_grad_()
    targets = targets_of(random_logits(1, N, V, seed=3), K)
    for config, shares in ((LossConfig(), None), (OWN_DRAWS, torch.zeros(1, N, K))):
        positions = Positions(
            target_ids=torch.zeros(1, N, dtype=torch.long),
            weights=torch.ones(1, N),
            targets=replace(targets, draw_shares=shares),
        )
        found = fused_objective(hidden, OutputLayer(weight=weight, bias=None), positions, config)
        found.loss_sum.backward()
    draws = np.arange(COMPILED_DRAWS, dtype=np.int32).reshape(2, -1)
    _distinct(draws, draws[:, :1])
    answer = Distributions(
        start=1,
        token_ids=draws[:, :1],
        logprobs=np.full((2, 1), -2, np.float32),
        target_logprobs=np.zeros(2, np.float32),
        log_tail=np.full(2, -1, np.float32),
        sampled_token_ids=draws,
        sampled_logprobs=np.full(draws.shape, -9, np.float32),
    )
    target_rows(answer, np.arange(2), "student_tail", draw_logprobs=np.full(draws.shape, -9, np.float32))
    rows = np.sort(draws, axis=1)
    np.testing.assert_array_equal(
        sorted_rows.unpack_sorted(sorted_rows.pack_sorted(rows, 15), len(rows), rows.shape[1], 15), rows
    )
    assert [len(each.signatures) for each in LOOPS] == loaded
