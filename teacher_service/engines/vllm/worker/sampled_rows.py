"""Rows of generated tokens from the logits of one decode pass, packed as `request_plan.pack` does, for both model runners."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillhouse.teacher_service.distributions import draws
from stillhouse.teacher_service.distributions.from_logits import RowSpec
from stillhouse.teacher_service.distributions.normalisation import as_float32, is_compiled
from stillhouse.teacher_service.distributions.row_tensors import GROUP_ELEMENTS, RowInputs, row_tensors
from stillhouse.teacher_service.distributions.to_device import to_device
from stillhouse.teacher_service.engine import DistributionOptions
from stillhouse.teacher_service.engines.vllm.worker.batch_sampling import SampledRows, sample_rows
from stillhouse.teacher_service.engines.vllm.worker.request_plan import SamplingPlan, pack

# Axes: B rows, V vocabulary, R samples.


def sampled_columns(
    logits_BV: Tensor,
    plans: list[SamplingPlan],
    positions: list[int],
    uniforms_BR: npt.NDArray[np.float64] | None,
) -> tuple[Tensor, Tensor]:
    """Samples a token for each row of FLOAT32 logits, and packs it with its distribution: (ids, values), NaN first for
    non-finite logits.

    Plans share `options` and `num_valid`; `positions` count the tokens generated before; `uniforms_BR` are those of
    `prefix_uniforms`.
    """
    sampled = sample_rows(logits_BV, plans, positions)
    return columns_of(logits_BV, sampled, plans[0].options, uniforms_BR)


def columns_of(
    logits_BV: Tensor,
    sampled: SampledRows,
    options: DistributionOptions | None,
    uniforms_BR: npt.NDArray[np.float64] | None,
) -> tuple[Tensor, Tensor]:
    """Packs sampled tokens with the distributions of their logits, of any float type with `options`, else FLOAT32."""
    if options is None:
        finite_B = torch.isfinite(logits_BV.sum(dim=-1))
        nothing_B = torch.zeros_like(sampled.logprobs)
        values = [nothing_B.masked_fill(~finite_B, torch.nan), nothing_B, sampled.logprobs]
        return sampled.token_ids.int().unsqueeze(-1), torch.stack(values, dim=1)
    if uniforms_BR is None and _is_plain(options) and is_compiled(logits_BV, options.top_k):
        return _compiled_columns(logits_BV, sampled, options.top_k)
    uniforms = None if uniforms_BR is None else to_device(uniforms_BR, logits_BV.device)
    inputs = RowInputs(targets=sampled.token_ids, uniforms=uniforms)
    packed = pack(row_tensors(logits_BV, options, inputs), sampled.token_ids, sampled.logprobs)
    return packed.ids, packed.values


def _is_plain(options: DistributionOptions) -> bool:
    """True for top-k, target and tail alone."""
    more = options.temperatures, options.num_sampled_tokens, options.entropy, options.hidden_states
    return not any(more)


def _compiled_columns(logits_BV: Tensor, sampled: SampledRows, top_k: int) -> tuple[Tensor, Tensor]:
    """The same in few calls, during which the thread that computes the next step has the interpreter to itself."""
    from stillhouse.teacher_service.distributions.topk_numba import packed_rows

    num_rows = len(logits_BV)
    ids, values = np.empty((num_rows, 1 + top_k), np.int32), np.empty((num_rows, 3 + top_k), np.float32)
    targets, logprobs = sampled.token_ids.numpy(), sampled.logprobs.numpy()
    size = max(1, GROUP_ELEMENTS // logits_BV.shape[1])
    for begin in range(0, num_rows, size):
        some = slice(begin, begin + size)
        logits = as_float32(logits_BV[some]).numpy()
        packed_rows(logits, targets[some], logprobs[some], ids[some], values[some])
    return torch.from_numpy(ids), torch.from_numpy(values)


def prefix_uniforms(
    prefixes: Sequence[Sequence[int]], options: DistributionOptions | None
) -> npt.NDArray[np.float64] | None:
    """[B, R]: the uniforms that scoring the token after each prefix would use; None if no samples are requested."""
    if options is None or not options.num_sampled_tokens:
        return None
    rows = []
    for prefix in prefixes:
        spec = RowSpec(start=len(prefix), sequence=np.array([*prefix, 0], np.int32))
        rows.append(draws.uniforms(spec, options))
    return np.concatenate([each for each in rows if each is not None])
