"""A process that waits for a run loads the compiled code that the run's steps call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.protos.tensors import exponentials_numba, sorted_rows, sorted_rows_numba
from stillhouse.student_trainer.config.schema import LossConfig
from stillhouse.student_trainer.train.batching import distinct_numba
from stillhouse.student_trainer.train.batching.target_forms import COMPILED_DRAWS, _distinct
from stillhouse.student_trainer.train.loss.fused import OutputLayer, fused_objective
from stillhouse.student_trainer.train.loss.logit_chunk import COMPILED_VOCAB
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.setup.first_use import load_first_use
from tests.student_trainer.train.loss.dense_reference import random_logits, targets_of

N, H, V, K = 5, 8, COMPILED_VOCAB, 4
LOOPS = (
    exponentials_numba._replace,
    exponentials_numba._replace_by_shares,
    distinct_numba._count,
    sorted_rows_numba._read_levels,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_finds_its_compiled_code_loaded(dtype: torch.dtype) -> None:
    load_first_use()
    loaded = [len(each.signatures) for each in LOOPS]
    assert all(loaded)
    weight = random_logits(V, H, seed=1, dtype=dtype).requires_grad_()
    hidden = random_logits(N, H, seed=2, dtype=dtype).requires_grad_()
    positions = Positions(
        target_ids=torch.zeros(1, N, dtype=torch.long),
        weights=torch.ones(1, N),
        targets=targets_of(random_logits(1, N, V, seed=3), K),
    )
    found = fused_objective(hidden, OutputLayer(weight=weight, bias=None), positions, LossConfig())
    found.loss_sum.backward()
    draws = np.arange(COMPILED_DRAWS, dtype=np.int32).reshape(2, -1)
    _distinct(draws, draws[:, :1])
    rows = np.sort(draws, axis=1)
    np.testing.assert_array_equal(
        sorted_rows.unpack_sorted(sorted_rows.pack_sorted(rows, 15), len(rows), rows.shape[1], 15), rows
    )
    assert [len(each.signatures) for each in LOOPS] == loaded
