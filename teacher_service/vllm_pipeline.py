"""vLLM reads the next prompts while rows of those before them are still being selected: a step's answer may wait for the step after it.

Only steps that score prompts and write nothing wait, and one at a time, so that no sample is held up. It wraps
`Scheduler.update_from_output`, to which every step's answer goes; a scheduler knows requests that are in flight, because
a model in several stages has them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

METHOD = "update_from_output"


class PendingRows(dict[str, Any]):
    """vLLM's `prompt_logprobs_dict` of a step, in whose arrays the rows stand once `finish` has returned."""

    def __init__(self, tensors: dict[str, Any], finish: Callable[[], None]) -> None:
        """`finish` may be called once, by the thread that runs vLLM's steps."""
        super().__init__(tensors)
        self.finish = finish


def install() -> None:
    """Wraps the method once. Raises ImportError, AttributeError or TypeError where it is not the one that is known."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original = getattr(Scheduler, METHOD)
    if is_installed():
        return
    found = list(inspect.signature(original).parameters)
    if found != ["self", "scheduler_output", "model_runner_output"]:
        raise TypeError(f"Scheduler.{METHOD} takes {found}")
    setattr(Scheduler, METHOD, _waiting(original))


def is_installed() -> bool:
    """Whether somebody in this process finishes `PendingRows`."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return bool(getattr(getattr(Scheduler, METHOD), "stillhouse", False))


def _waiting(
    original: Callable[[Any, Any, Any], dict[int, Any]],
) -> Callable[[Any, Any, Any], dict[int, Any]]:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        before = getattr(self, "stillhouse_before", None)
        if before is not None:
            self.stillhouse_before = None
            before[1].prompt_logprobs_dict.finish()
            answers = original(self, *before)
        if isinstance(model_runner_output.prompt_logprobs_dict, PendingRows):
            self.stillhouse_before = (scheduler_output, model_runner_output)
            return answers
        return joined(answers, original(self, scheduler_output, model_runner_output))

    update_from_output.stillhouse = True  # type: ignore[attr-defined]
    return update_from_output


def joined(earlier: dict[int, Any], later: dict[int, Any]) -> dict[int, Any]:
    """The answers of two steps, by client, as if of one."""
    for client, first in earlier.items():
        second = later.setdefault(client, first)
        if second is first:
            continue
        second.outputs = [*first.outputs, *second.outputs]
        if first.finished_requests:
            second.finished_requests = first.finished_requests | (second.finished_requests or set())
    return later
