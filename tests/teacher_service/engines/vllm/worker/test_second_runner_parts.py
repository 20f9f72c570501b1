"""Parts of the second model runner that need no vLLM: the copy of a step, and samples over preemption."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.teacher_service.engine import DistributionOptions, GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.vllm.worker.request_plan import (
    STREAM_INTERVAL_TOKENS,
    SamplingPlan,
    ScorePlan,
)
from stillhouse.teacher_service.engines.vllm.worker.second_runner import install
from stillhouse.teacher_service.engines.vllm.worker.second_runner.requests import (
    PlannedRequests,
    Sample,
    ScoredPrompt,
)
from stillhouse.teacher_service.engines.vllm.worker.second_runner.sampler import SampledStep
from stillhouse.teacher_service.engines.vllm.worker.second_runner.step_copy import StepCopy

MAX_MODEL_LEN = 100


def test_a_step_leaves_in_one_copy_whatever_it_holds() -> None:
    halves = torch.arange(3, dtype=torch.float16).reshape(3, 1)
    ids, values = torch.arange(6, dtype=torch.int32).reshape(3, 2), torch.rand(3, 5)
    step = StepCopy()
    keys = [step.add((halves, ids)), step.add((torch.empty(4, 0), ids[1:2], values[:, :2]))]
    step.start()
    step.start()
    step.wait()
    assert step._flat is not None
    assert step._flat.numel() == 3 * 2 + 6 * 4 + 2 * 4 + 6 * 4
    (one, two), (empty, three, four) = (step.arrays(key) for key in keys)
    assert one.tolist() == halves.tolist()
    assert two.tolist() == ids.tolist()
    assert empty.shape == (4, 0)
    assert three.tolist() == [[2, 3]]
    assert np.array_equal(four, values[:, :2].numpy())
    assert all(each.base is not None for each in (one, two, three, four))  # views of one buffer


def output(new: list[Any], finished: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    return SimpleNamespace(scheduled_new_reqs=new, finished_req_ids=finished)


def new_request(name: str, prompt: list[int], plan: Any, generated: list[int] = []) -> Any:  # noqa: B006
    params = SimpleNamespace(
        extra_args=plan and plan.to_extra_args(), max_tokens=60, stop_token_ids=[7], eos_token_id=None
    )
    return SimpleNamespace(
        req_id=name, prompt_token_ids=prompt, prefill_token_ids=prompt + generated, sampling_params=params
    )


def sampling_plan() -> SamplingPlan:
    item = GenerateInput(token_ids=np.zeros(1, np.int32), options=DistributionOptions(top_k=0))
    return SamplingPlan.from_input(item, seed=1, num_valid=50)


def run_step(sample: Sample, token: int) -> Any:
    """The rows that leave with a step in which this token is sampled."""
    step = SampledStep(StepCopy(), MAX_MODEL_LEN)
    position = len(sample.tokens) - sample.num_prompt_tokens
    step.add([3], [sample], [position], torch.tensor([[token]], dtype=torch.int32), torch.zeros(1, 3))
    return step.to_cpu_nonblocking().tolists().slice_request(3, 1)


def test_requests_are_known_from_their_first_step_to_their_last() -> None:
    requests = PlannedRequests()
    item = ScoreInput(token_ids=np.arange(5, dtype=np.int32), start=2, options=DistributionOptions(top_k=1))
    requests.update(
        output(
            [
                new_request("s", [0, 1, 2, 3], ScorePlan.from_input(item)),
                new_request("g", [5, 6], sampling_plan()),
                new_request("x", [5, 6], None),
            ]
        )
    )
    scored, sample = requests.get("s"), requests.get("g")
    assert isinstance(scored, ScoredPrompt)
    assert scored.sequence.tolist() == [0, 1, 2, 3, 4]
    assert isinstance(sample, Sample)
    assert requests.get("x") is None
    requests.update(output([], {"s", "unknown"}))
    assert requests.get("s") is None
    assert requests.get("g") is sample


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_preempted_sample_keeps_the_rows_of_the_tokens_it_keeps(dropped: int) -> None:
    requests = PlannedRequests()
    requests.update(output([new_request("g", [5, 6], sampling_plan())]))
    sample = requests.get("g")
    assert isinstance(sample, Sample)
    assert len(run_step(sample, 10).logprob_token_ids) == 1  # the front end emits the first token at once
    for token in (11, 12, 13):
        assert run_step(sample, token) is None
    kept = [10, 11, 12, 13][: 4 - dropped]
    requests.update(output([new_request("g", [5, 6], sampling_plan(), kept)]))
    assert requests.get("g") is sample
    for token in range(len(kept), STREAM_INTERVAL_TOKENS):
        assert run_step(sample, 20 + token) is None
    rows = run_step(sample, 7)
    wanted = [*kept[1:], *range(20 + len(kept), 20 + STREAM_INTERVAL_TOKENS), 7]
    assert rows.logprob_token_ids[:, 0].tolist() == wanted
    assert sample.tokens == [5, 6, 10, *wanted]


def test_rows_of_a_later_step_wait_for_their_own_output() -> None:
    requests = PlannedRequests()
    requests.update(output([new_request("g", [5, 6], sampling_plan())]))
    sample = requests.get("g")
    assert isinstance(sample, Sample)
    steps = []
    for position, token in enumerate((10, 7)):
        step = SampledStep(StepCopy(), MAX_MODEL_LEN)
        step.add([0], [sample], [position], torch.tensor([[token]], dtype=torch.int32), torch.zeros(1, 3))
        step.to_cpu_nonblocking()
        step.settle()  # as the step after it does, which needs the token
        steps.append(step)
    assert sample.tokens == [5, 6, 10, 7]
    released = [step.tolists().slice_request(0, 1).logprob_token_ids[:, 0].tolist() for step in steps]
    assert released == [[10], [7]]


def test_a_runner_of_another_version_is_refused_with_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    runner = GPUModelRunner.__new__(GPUModelRunner)
    assert install.is_second_runner(runner)
    parts = dict.fromkeys(("batch_sharder", "speculator", "pcp_manager", "pooling_runner"))
    known = dict.fromkeys(("model", "device", "vocab_size", "max_num_reqs", "max_model_len"), 1)
    sampler, scorer = Sampler.__new__(Sampler), PromptLogprobsWorker.__new__(PromptLogprobsWorker)
    vars(runner).update(
        **parts, **known, is_last_pp_rank=True, sampler=sampler, prompt_logprobs_worker=scorer
    )
    assert list(install._differences(runner)) == []

    def compute_prompt_logprobs(self: Any, logits_fn: Any, batch: Any) -> None:
        """Takes fewer arguments."""

    monkeypatch.setattr(PromptLogprobsWorker, "compute_prompt_logprobs", compute_prompt_logprobs)
    runner.speculator = object()
    with pytest.raises(TypeError, match="compute_prompt_logprobs takes self logits_fn batch"):
        install.install(runner)
    monkeypatch.undo()
    with pytest.raises(TypeError, match="the runner has a speculator"):
        install.install(runner)
    assert runner.sampler is sampler
