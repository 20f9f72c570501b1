"""Names what a run waits for, and what to do next, in a sentence with the command."""

from __future__ import annotations

from stillhouse.client.trainer.run_lookup import CACHE_TASKS, run_id
from stillhouse.protos.errors import Reason, from_status
from stillhouse.protos.stillhouse.v1.run_pb2 import Run


def waits_for(run: Run) -> str:
    """Names what keeps a PENDING run, or one without a teacher, from starting or going on; empty for others."""
    if run.condition == Run.CONDITION_WAITING_FOR_TEACHER:
        targets = [target for each in run.effective_spec.teachers for target in each.targets]
        return f"a teacher at {' or '.join(targets)}" if targets else "a teacher"
    if run.state != Run.STATE_PENDING:
        return ""
    resources = run.effective_spec.resources
    if resources.gpus:
        needed = f"device {', '.join(map(str, resources.gpus))} of the trainer"
    elif resources.gpu_count:
        needed = "a free GPU" if resources.gpu_count == 1 else f"{resources.gpu_count} free GPUs"
    else:
        needed = "a free CPU slot"
    ahead = run.queue_position
    return f"{needed}, behind {ahead} run{'s' if ahead > 1 else ''}" if ahead else needed


_KEPT = frozenset({Reason.INVALID_SPEC, Reason.TOKENIZER_MISMATCH})
"""Errors of settings, which a resume keeps."""
_IN_PLACE = frozenset(
    {
        *(Reason.MODEL_NOT_FOUND, Reason.TOKENIZER_INVALID, Reason.ADAPTER_INVALID, Reason.DATASET_NOT_FOUND),
        *(
            Reason.DATASET_INVALID,
            Reason.CACHE_NOT_FOUND,
            Reason.CACHE_MISS,
            Reason.CACHE_INVALID,
            Reason.PATH_NOT_ALLOWED,
        ),
    }
)
"""Errors of files that a run reads by path, which may be corrected under it."""


def next_step(run: Run) -> str:
    """Tells where an ended run's model is and how to fetch it, how to continue, or what a waiting one needs."""
    name = run_id(run.name)
    if run.state == Run.STATE_COMPLETED:
        if run.effective_spec.task in CACHE_TASKS:
            return f"the cache is {run.spec.cache.path}, which run files of this trainer may name"
        if run.effective_spec.task == "evaluate":
            return f"`stillhouse eval {name} --report` shows its report"
        return f"the model is {run.name}/final on the trainer's host; `stillhouse run pull {name}` copies it here"
    if run.state == Run.STATE_STOPPED:
        return _continuation(run)
    if run.state == Run.STATE_FAILED:
        return f"`stillhouse run logs {name}` shows its log; {_after_failure(run)}"
    if run.state == Run.STATE_PENDING:
        return f"`stillhouse run watch {name}` follows it; `stillhouse run list --state running` shows what runs now"
    if run.condition == Run.CONDITION_WAITING_FOR_TEACHER:
        limit = f"{run.effective_spec.retry.teacher_wait_s:g} s (retry.teacher_wait_s)"
        return f"start the teacher; a run that had one waits up to {limit}, one that never reached it 15 s"
    if run.condition == Run.CONDITION_PREPARING_DATA:
        return f"its rows are encoded once and kept for later runs; `stillhouse run watch {name}` shows how far that is"
    return f"`stillhouse run watch {name}` follows it"


def _continuation(run: Run) -> str:
    resume = f"`stillhouse run resume {run_id(run.name)}`"
    if run.effective_spec.task in CACHE_TASKS:
        return f"{resume} continues it; what the cache holds is kept"
    if run.latest_checkpoint:
        return f"{resume} continues from {run.latest_checkpoint.removeprefix(f'{run.name}/')}"
    return f"it has no checkpoint yet, so {resume} starts it again from the first step"


def _after_failure(run: Run) -> str:
    reason = from_status(run.error).reason
    if reason in _KEPT:
        return "a resume keeps the settings: correct the run file, and `stillhouse run create` begins another run"
    if reason in _IN_PLACE:
        resume = f"`stillhouse run resume {run_id(run.name)}` starts it again"
        return f"correct the files where they are, then {resume}; other paths need a new run"
    return _continuation(run)
