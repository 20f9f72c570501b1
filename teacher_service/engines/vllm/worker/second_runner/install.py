"""Puts the rows of prompts and samples into vLLM's second model runner, after a comparison of its signatures.

Written for vLLM 0.32 and 0.33, whose code is the same here; run on a CPU, where Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from stillhouse.teacher_service.engines.vllm.worker.second_runner.prompt_rows import PromptScorer
from stillhouse.teacher_service.engines.vllm.worker.second_runner.requests import PlannedRequests
from stillhouse.teacher_service.engines.vllm.worker.second_runner.sampler import PlannedSampler

MODULE = "vllm.v1.worker.gpu.model_runner"
"""The module in which vLLM defines the runner."""
_BATCH = {
    "req_ids", "num_scheduled_tokens", "query_start_loc_np", "seq_lens_cpu_upper_bound", "prefill_len_np",
    "num_computed_prefill_tokens_np",
}  # fmt: skip
_NEW = {"req_id", "prompt_token_ids", "prefill_token_ids", "sampling_params"}
_SAMPLED = {"sampled_token_ids", "logprobs_tensors", "num_nans", "num_sampled", "num_rejected"}
_WITHOUT = ("batch_sharder", "speculator", "pcp_manager", "pooling_runner")
"""Parts of the runner that change what a step's rows are."""


def is_second_runner(runner: Any) -> bool:
    """True for vLLM's second model runner, and its subclass for CPUs."""
    return any(base.__module__ == MODULE for base in type(runner).__mro__)


def install(runner: Any) -> None:
    """Replaces sampler and prompt scorer of a runner whose model is loaded.

    Raises ImportError, AttributeError or TypeError, with the difference, for a runner of another version.
    """
    for difference in _differences(runner):
        raise TypeError(difference)
    if not runner.is_last_pp_rank:
        return  # it has neither
    requests = PlannedRequests()
    scorer = PromptScorer(runner, runner.prompt_logprobs_worker, requests)

    def begin(step: Any) -> None:
        scorer.step = step

    runner.sampler = PlannedSampler(runner, runner.sampler, requests, begin)
    runner.prompt_logprobs_worker = scorer
    runner.add_requests = _followed(runner.add_requests, requests)


def _followed(original: Callable[[Any], None], requests: PlannedRequests) -> Callable[[Any], None]:
    def add_requests(scheduler_output: Any) -> None:
        requests.update(scheduler_output)
        original(scheduler_output)

    return add_requests


def _differences(runner: Any) -> Iterator[str]:
    """Yields how the runner differs from the one that this code is written for."""
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.async_utils import AsyncOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.output import SamplerOutput
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    for method, known in (
        (GPUModelRunner.add_requests, "self scheduler_output"),
        (GPUModelRunner.sample, "self hidden_states input_batch grammar_output"),
        (Sampler.__call__, "self logits input_batch"),
        (PromptLogprobsWorker.add_request, "self req_id req_idx sampling_params"),
        (
            PromptLogprobsWorker.compute_prompt_logprobs,
            "self logits_fn hidden_states input_batch all_token_ids num_computed_tokens prompt_lens",
        ),
        (
            AsyncOutput.__init__,
            "self model_runner_output sampler_output num_sampled_tokens main_stream copy_stream check_ep_fault "
            "pending_aux_output",
        ),
    ):
        found = " ".join(inspect.signature(method).parameters)
        if found != known:
            yield f"{method.__qualname__} takes {found}"
    for kind, names in ((InputBatch, _BATCH), (NewRequestData, _NEW), (SamplerOutput, _SAMPLED)):
        if missing := names - {each.name for each in fields(kind)}:
            yield f"{kind.__name__} lacks {sorted(missing)}"
    for name in ("model", "device", "vocab_size", "max_num_reqs", "max_model_len", "is_last_pp_rank"):
        getattr(runner, name)
    for name in _WITHOUT:
        if getattr(runner, name) is not None:
            yield f"the runner has a {name}"
    if runner.is_last_pp_rank:
        for part, expected in (
            (runner.sampler, Sampler),
            (runner.prompt_logprobs_worker, PromptLogprobsWorker),
        ):
            if type(part) is not expected:
                yield f"the runner has a {type(part).__name__}"
