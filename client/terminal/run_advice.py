"""Names what a run waits for, and what to do next, in a sentence with the command."""

from __future__ import annotations

from stillhouse.client.trainer.run_lookup import run_id
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


def next_step(run: Run) -> str:
    """Tells where an ended run's model is and how to fetch it, how to continue, or what a waiting one needs."""
    name = run_id(run.name)
    if run.state == Run.STATE_COMPLETED:
        if run.effective_spec.task == "cache":
            return f"the cache is {run.spec.cache.path}, which run files of this trainer may name"
        return f"the model is {run.name}/final on the trainer's host; `stillhouse run pull {name}` copies it here"
    continues = (
        f"`stillhouse run resume {name}` continues from {run.latest_checkpoint.removeprefix(f'{run.name}/')}"
        if run.latest_checkpoint
        else f"`stillhouse run resume {name}` starts it again"
    )
    if run.state == Run.STATE_STOPPED:
        return continues
    if run.state == Run.STATE_FAILED:
        return f"`stillhouse run logs {name}` shows its log; {continues}"
    if run.state == Run.STATE_PENDING:
        return f"`stillhouse run watch {name}` follows it; `stillhouse run list --state running` shows what runs now"
    if run.condition == Run.CONDITION_WAITING_FOR_TEACHER:
        limit = f"{run.effective_spec.retry.teacher_wait_s:g} s (retry.teacher_wait_s)"
        return f"start the teacher; a run that had one waits up to {limit}, one that never reached it 15 s"
    return f"`stillhouse run watch {name}` follows it"
