"""Samples tokens inside vLLM's worker, and reports their distributions, from the logits of one decode pass.

Replaces `_sample` of vLLM's first model runner for requests with a plan; run on the CPU build only. The next pass needs the
tokens alone: distributions are left to helper threads, where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stillhouse.teacher_service.distributions import normalisation, row_tensors
from stillhouse.teacher_service.engine import DistributionOptions
from stillhouse.teacher_service.engines.vllm.worker.batch_sampling import SampledRows, sample_rows
from stillhouse.teacher_service.engines.vllm.worker.cpu_threads import HelperThreads
from stillhouse.teacher_service.engines.vllm.worker.request_plan import SamplingPlan
from stillhouse.teacher_service.engines.vllm.worker.row_buffer import (
    Array,
    OutgoingRows,
    RowsOfSample,
    Slab,
    block_rows,
    is_due,
)
from stillhouse.teacher_service.engines.vllm.worker.sampled_rows import columns_of, prefix_uniforms

_Work = Callable[[], tuple[Array, Array]]
_SHARED_ELEMENTS = 1 << 16
"""Smallest number of logits worth sharing with another thread."""


def sampler(
    runner: Any,
    original: Callable[..., Any],
    get_plan: Callable[[Any], Any],
    helpers: HelperThreads,
    *,
    pending: bool = False,
) -> Callable[..., Any]:
    """Builds the replacement of `runner._sample`; with `pending` rows leave it before helpers have computed them.

    The mandatory token after a scored prompt is ignored, and not sampled.
    """
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput

    on_cpu, longest = runner.device.type == "cpu", runner.max_model_len
    defers = on_cpu and helpers.count > 0

    def sample(logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        requests = [runner.requests[name] for name in runner.input_batch.req_ids]
        plans = [get_plan(request) for request in requests]
        if logits is None or spec_decode_metadata is not None or not any(plans):
            return original(logits, spec_decode_metadata)
        step = _Step(tokens=torch.zeros((len(plans), 1), dtype=torch.int32, device=logits.device))
        if foreign := [row for row, plan in enumerate(plans) if plan is None]:
            # vLLM's sampler overwrites its input.
            step.copy(foreign, original(logits.clone(), spec_decode_metadata))
        unfinished = runner.discard_request_mask.np
        with helpers.sharing() as share:
            for rows in _row_groups(plans, unfinished, logits, helpers.count + 1):
                chosen = _Group(
                    rows=rows, plans=[plans[row] for row in rows], requests=[requests[row] for row in rows]
                )
                share(partial(_sample_into, step, chosen, logits, defers=defers))
        if on_cpu:
            released = _released_rows(
                step, requests, longest, step.waiting_work(logits), helpers, pending=pending
            )
        else:
            released = step.tensors(LogprobsTensors)
        return SamplerOutput(sampled_token_ids=step.tokens, logprobs_tensors=released)

    return sample


def _released_rows(
    step: _Step,
    requests: list[Any],
    longest: int,
    waiting: list[tuple[list[int], _Work]],
    helpers: HelperThreads,
    *,
    pending: bool,
) -> OutgoingRows:
    """Rows released with this step, with the earlier rows of their samples; helpers compute those that are `waiting`, and vLLM's own
    are released at once."""
    tokens: list[int] = step.tokens[:, 0].tolist()
    released: dict[int, tuple[Any, Any, Array]] = {}
    for rows, ids, values in step.parts:
        if requests[rows[0]].stillhouse_plan is None:
            assert step.ranks is not None
            parts, ranks = (ids.numpy(), values.numpy()), step.ranks.numpy()
            for at, row in enumerate(rows):
                released[row] = parts[0][at : at + 1], parts[1][at : at + 1], ranks[row : row + 1]
            continue
        places = _Places()
        due = places.add(rows, requests, tokens, longest)
        places.write(ids.numpy(), values.numpy())
        released |= {row: each.leave(pending=False) for row, each in due}
    for rows, work in waiting:
        places = _Places()
        due = places.add(rows, requests, tokens, longest)
        places.write_later(work, helpers)
        released |= {row: each.leave(pending=pending) for row, each in due}
    return OutgoingRows(released)


class _Places:
    """Places in slabs of one row of each of some samples with equal options."""

    def __init__(self) -> None:
        self._by_slab: dict[Slab, tuple[list[int], list[int], list[int]]] = {}
        """Indices of rows, their samples in the slab, and the samples' earlier rows."""

    def add(
        self, rows: list[int], requests: list[Any], tokens: list[int], longest: int
    ) -> list[tuple[int, RowsOfSample]]:
        """Adds the samples of these rows of the batch; those whose rows are released with it."""
        new: dict[int, Slab] = {}
        due = []
        for at, row in enumerate(rows):
            request = requests[row]
            sample = getattr(request, "stillhouse_rows", None)
            if sample is None:
                size = block_rows(len(request.output_token_ids))
                if size not in new:
                    new[size] = Slab(size)
                sample = request.stillhouse_rows = RowsOfSample(new[size])
            slab = sample.slab
            if slab not in self._by_slab:
                self._by_slab[slab] = [], [], []
            places, samples, counts = self._by_slab[slab]
            places.append(at)
            samples.append(sample.sample)
            counts.append(sample.count)
            sample.count += 1
            if _is_due(request, tokens[row], longest):
                due.append((row, sample))
                request.stillhouse_rows = None
        return due

    def write(self, ids: Array, values: Array) -> None:
        """Writes the rows."""
        for slab, (places, samples, counts) in self._by_slab.items():
            some = slice(None) if len(places) == len(ids) else places
            slab.write(samples, counts, ids[some], values[some])

    def write_later(self, work: _Work, helpers: HelperThreads) -> None:
        """Leaves it to helpers to compute the rows, and to write them."""
        deferred = helpers.defer(lambda: self.write(*work()))
        for slab in self._by_slab:
            slab.expect(deferred)


def _is_due(request: Any, token: int, longest: int) -> bool:
    written, room = len(request.output_token_ids), longest - request.num_prompt_tokens
    return is_due(request.sampling_params, token, written=written, room=room)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Rows of the batch with equal options, with their plans and requests."""

    rows: list[int]
    plans: list[SamplingPlan]
    requests: list[Any]

    def prefixes(self) -> list[list[int]]:
        """Tokens before each row's token, for options with draws; else nothing."""
        options = self.plans[0].options
        if options is None or not options.num_sampled_tokens:
            return []
        return [[*request.prompt_token_ids, *request.output_token_ids] for request in self.requests]


@dataclass(kw_only=True, slots=True)
class _Step:
    """Results of one decode pass: a token for each row of the batch, and columns of rows that report any."""

    tokens: Tensor
    parts: list[tuple[list[int], Tensor, Tensor]] = field(default_factory=list)
    waiting: list[tuple[_Group, SampledRows]] = field(default_factory=list)
    """Rows whose columns are not computed yet."""
    ranks: Tensor | None = None

    def waiting_work(self, logits: Tensor) -> list[tuple[list[int], _Work]]:
        """Waiting rows and the computation of their columns, those of equal options together."""
        found: list[tuple[list[int], _Work]] = []
        by_options: dict[Any, list[tuple[_Group, SampledRows]]] = {}
        for group, sampled in sorted(self.waiting, key=lambda each: each[0].rows[0]):
            plan = group.plans[0]
            by_options.setdefault((plan.options, plan.num_valid), []).append((group, sampled))
        for (options, _), waiting in by_options.items():
            rows = [row for group, _ in waiting for row in group.rows]
            work = partial(
                _arrays,
                _select_rows(logits, rows),
                SampledRows(
                    token_ids=torch.cat([sampled.token_ids for _, sampled in waiting]),
                    logprobs=torch.cat([sampled.logprobs for _, sampled in waiting]),
                ),
                options,
                [prefix for group, _ in waiting for prefix in group.prefixes()],
            )
            found.append((rows, work))
        return found

    def copy(self, rows: list[int], output: Any) -> None:
        """Copies the results of vLLM's sampler for these rows."""
        self.tokens[rows] = output.sampled_token_ids[rows].to(self.tokens.dtype)
        if (theirs := output.logprobs_tensors) is not None:
            self.parts.append((rows, theirs.logprob_token_ids[rows], theirs.logprobs[rows]))
            self.ranks = theirs.selected_token_ranks

    def tensors(self, kind: Callable[..., Any]) -> Any:
        """Joins all columns into vLLM's `LogprobsTensors`, as wide as the widest."""
        num_rows, device = len(self.tokens), self.tokens.device
        if len(self.parts) == 1 and len(self.parts[0][0]) == num_rows:
            _, ids, values = self.parts[0]
        else:
            columns = [(ids, values) for _, ids, values in self.parts]
            num_ids, num_values = (max((part[at].shape[1] for part in columns), default=1) for at in (0, 1))
            ids = torch.zeros((num_rows, num_ids), dtype=torch.int32, device=device)
            values = torch.zeros((num_rows, num_values), dtype=torch.float32, device=device)
            for rows, some_ids, some_values in self.parts:
                ids[rows, : some_ids.shape[1]] = some_ids.int()
                values[rows, : some_values.shape[1]] = some_values
        ranks = torch.zeros(num_rows, dtype=torch.int32, device=device) if self.ranks is None else self.ranks
        return kind(ids, values, ranks)


def _sample_into(step: _Step, group: _Group, logits: Tensor, *, defers: bool) -> None:
    """Samples a token for each row of a group, with its columns unless it `defers` them."""
    options = group.plans[0].options
    positions = [len(request.output_token_ids) for request in group.requests]
    logits_BV = normalisation.as_float32(_select_rows(logits, group.rows))
    sampled = sample_rows(logits_BV, group.plans, positions)
    step.tokens[group.rows, 0] = sampled.token_ids.int()
    if defers and options is not None:
        step.waiting.append((group, sampled))
        return
    uniforms = prefix_uniforms(group.prefixes(), options)
    step.parts.append((group.rows, *columns_of(logits_BV, sampled, options, uniforms)))


def _arrays(
    logits_BV: Tensor, sampled: SampledRows, options: DistributionOptions, prefixes: list[list[int]]
) -> tuple[Array, Array]:
    ids, values = columns_of(logits_BV, sampled, options, prefix_uniforms(prefixes, options))
    return ids.numpy(), values.numpy()


def _row_groups(plans: list[Any], unfinished: Any, logits: Tensor, num_threads: int) -> Iterator[list[int]]:
    """Groups rows to sample by equal options, in sizes that fit a CPU's cache and occupy its threads."""
    groups: dict[Any, list[int]] = {}
    for row, plan in enumerate(plans):
        # Partially read prompts have an unused row here, too.
        if isinstance(plan, SamplingPlan) and not unfinished[row]:
            groups.setdefault((plan.options, plan.num_valid), []).append(row)
    whole = (
        max(1, row_tensors.GROUP_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(plans)
    )
    for rows in groups.values():
        least = max(1, _SHARED_ELEMENTS // logits.shape[1])
        size = whole if num_threads == 1 else min(whole, max(least, -(-len(rows) // num_threads)))
        for begin in range(0, len(rows), size):
            yield rows[begin : begin + size]


def _select_rows(logits: Tensor, rows: list[int]) -> Tensor:
    adjacent = rows[-1] - rows[0] + 1 == len(rows)
    return logits[rows[0] : rows[-1] + 1] if adjacent else logits[rows]
