"""The core that vLLM leaves to its front end on a CPU computes too in a step that only scores prompts: nobody's text waits for it.

A step that writes keeps vLLM's own number of threads, because the front end has work with every token of it, but for the
first step of its size: vLLM's products on a CPU keep, for each number of rows, the number of threads that they were
first computed with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from teacher_service.vllm_plan import start_of

Step = Callable[..., Any]
KEPT_SIZES = 32
"""Numbers of rows for which vLLM keeps its products; those that were not used for longest go first."""


def only_scores(runner: Any, scheduler_output: Any) -> bool:
    """Whether every sequence of a step is a prompt whose rows Stillhouse asked for."""
    new = {each.req_id: each.sampling_params for each in scheduler_output.scheduled_new_reqs}
    names = scheduler_output.num_scheduled_tokens
    params = (new[name] if name in new else runner.requests[name].sampling_params for name in names)
    return bool(names) and all(each is not None and start_of(each.extra_args) is not None for each in params)


def with_free_cores(runner: Any, step: Step, helpers: int) -> Step:
    """The runner's `execute_model`, with `helpers` more threads where it only scores, and at a size that is not kept.

    Raises AttributeError if this PyTorch has no such switch. vLLM's worker has taken `torch.set_num_threads` away, for its
    threads are bound to cores elsewhere; here they are not.
    """
    set_num_threads = torch._C.set_num_threads
    sizes: OrderedDict[int, None] = OrderedDict()

    def is_kept(size: int) -> bool:
        """Whether products of so many rows were computed lately; from now on they were."""
        known = size in sizes
        sizes[size] = None
        sizes.move_to_end(size)
        if len(sizes) > KEPT_SIZES:
            sizes.popitem(last=False)
        return known

    def execute_model(scheduler_output: Any, *arguments: Any, **named: Any) -> Any:
        if is_kept(scheduler_output.total_num_scheduled_tokens) and not only_scores(runner, scheduler_output):
            return step(scheduler_output, *arguments, **named)
        before = torch.get_num_threads()
        set_num_threads(before + helpers)
        try:
            return step(scheduler_output, *arguments, **named)
        finally:
            set_num_threads(before)

    return execute_model
