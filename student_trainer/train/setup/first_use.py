"""Loads what a run needs at the latest in its first step, so that a process which waits for a run has it already."""

from __future__ import annotations

import contextlib
import os

import numpy as np

from stillhouse.protos.library_imports import import_modules

MODULES = ("transformers.modeling_layers", "pyarrow.compute", "torch.utils.tensorboard")


def load_first_use() -> None:
    """Imports modules, and loads compiled code where the process has no GPU; leaves to the run what is not installed."""
    with contextlib.suppress(ImportError):
        import_modules(MODULES)
        if not os.environ.get("CUDA_VISIBLE_DEVICES"):
            _load_kernels()


def _load_kernels() -> None:
    """Calls the compiled loops of an answer and a step once; their first call loads numba's compiler."""
    from stillhouse.protos.tensors import differences, falling_rows, reverse_kl_numba, sorted_rows
    from stillhouse.protos.tensors.exponentials_numba import exponentials, shares
    from stillhouse.student_trainer.train.batching.distinct_numba import count_distinct, own_draws
    from stillhouse.student_trainer.train.rollouts import llama_layer_numba

    one = slice(0, 1)
    for logits_RV in (np.zeros((1, 16), np.float32), np.zeros((1, 16), np.uint16)):  # bfloat16 as bits
        references_R, sums_R = np.zeros(1, np.float32), np.zeros(1, np.float64)
        exponentials(logits_RV, one, scale=1.0, keep=True, references_R=references_R, sums_R=sums_R)
        shares(logits_RV, [np.zeros(1, np.float32)] * 4, one, scale=1.0)
    ids_TD = np.zeros((1, 1), np.int32)
    no_logprobs_TD, wanted = np.zeros((1, 1), np.float32), np.ones(1, np.bool_)
    count_distinct(ids_TD, ids_TD, wanted, -1)
    own_draws(ids_TD, ids_TD, wanted, -1, logprobs=no_logprobs_TD, draw_logprobs=no_logprobs_TD)
    differences.prepare()
    falling_rows.prepare()
    sorted_rows.prepare()
    reverse_kl_numba.prepare()
    llama_layer_numba.prepare()
