"""Trial of a run's largest forward pass before its first step: a pass that cannot fit fails at once, with the figures.

The activations that a pass keeps for its backward pass grow with its tokens; two short passes tell by how much. So a
pass that would not fit is mostly known before it is tried, and on a CPU, which needs seconds for it, one that fits in any
case is not tried. No trial changes weights, gradients or random numbers.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import structlog
import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.library_errors import memory_cause
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.config.settled.micro_batch import HALVE_VARIABLE
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.data.corpus import longest_of
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.setup.run_context import RunContext
from stillhouse.student_trainer.train.setup.stretched_rows import stretched
from stillhouse.student_trainer.train.step import Stepper

log = structlog.get_logger()

FACT = "micro_batch_tokens"
"""Name of the limit among the facts of a checkpoint."""
SHORT_LENGTHS = (16, 48)
"""Lengths of the rows by which the activations of a token are measured."""
SHARE = 0.9
"""Share of the free memory that a pass may be expected to take."""
BUFFER_BYTES = 2**32
"""Bound on what a pass takes beside the activations that it keeps: chunks of logits, several at a time, and their gradients."""
STATE_BYTES = {"sgd": 0, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of an optimizer's states for each trained weight; 8 for all others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LargestPass:
    """Sizes of the largest pass of a context."""

    sample: ScoredExample
    """One of its rows, whose shape the trial's rows have."""
    longest: int
    """Tokens of its longest row."""
    rows: int
    """Rows of an update at most."""

    def rows_within(self, max_tokens: int) -> int:
        """Rows of the largest pass under this limit."""
        return max(1, min(self.rows, max_tokens // self.longest))


def fit_passes(run: RunContext, samples: Sequence[ScoredExample]) -> None:
    """Tries the largest pass of every context that has one of the first step's `samples`, and sets the limit that fits.

    Runs that cut by rows are left alone. Raises StillhouseError(OUT_OF_MEMORY) if a pass of one row, or of the tokens that
    the run file gives, does not fit.
    """
    stepper, config, ranks = run.student_side.stepper, run.scope.config, run.scope.ranks
    limit = stepper.cutter.max_tokens
    if limit is None:
        return
    is_auto = config.optimizer.micro_batch_tokens is None
    kept = run.checkpointer.kept_fact(FACT) if is_auto else None
    if kept:
        halved = os.environ.get(HALVE_VARIABLE) == "1"
        limit = max(1, min(limit, int(kept) // (2 if halved else 1)))
    trial = PassTrial(stepper=stepper, is_auto=is_auto, state_bytes=STATE_BYTES.get(config.optimizer.name, 8))
    examples = run.teacher_side.corpus.train
    largest = [_largest(each, config, examples) for each in samples]

    def fitting() -> int:
        found = limit
        for each in largest:
            found = trial.fit(each, found)
        return found

    agreed = min(ranks.exchange(ranks.agree(fitting), patient=True))
    stepper.cutter = replace(stepper.cutter, max_tokens=agreed)
    run.checkpointer.record({FACT: str(agreed)})
    log.info("forward passes", max_tokens=agreed, by="trial" if is_auto else "optimizer.micro_batch_tokens")


def _largest(sample: ScoredExample, config: RunConfig, examples: Sequence[Example]) -> LargestPass:
    """The largest pass of the sample's context."""
    context = config.contexts[sample.context]
    source = context.teacher or context.student
    rows = config.optimizer.rows_per_update
    if source is None:
        longest = longest_of(examples)
        assert longest is not None, "a run has rows to train on"
        return LargestPass(sample=sample, longest=len(longest.token_ids), rows=rows)
    prompt_tokens = max(len(each.prompt) for each in examples) + source.generation.max_new_tokens
    most = max(config.data.max_sequence_tokens, len(sample.example.token_ids))
    return LargestPass(
        sample=sample, longest=min(prompt_tokens, most), rows=rows * source.generation.samples_per_prompt
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTrial:
    """Tries passes of a run, with its own loss."""

    stepper: Stepper
    is_auto: bool
    """True if the limit may be lowered."""
    state_bytes: int
    """Bytes of the optimizer's states for each trained weight."""
    free_bytes: Callable[[torch.device], int] | None = None
    """Reads the memory that is free; None reads the device."""

    def fit(self, largest: LargestPass, max_tokens: int) -> int:
        """The highest limit up to `max_tokens` under which the largest pass fits. Raises as `fit_passes` does."""
        per_token = self._bytes_per_token(largest.sample) if largest.longest > max(SHORT_LENGTHS) else 0.0
        while True:
            rows = largest.rows_within(max_tokens)
            problem = self._problem(largest, rows, per_token)
            if not problem:
                return max_tokens
            if rows == 1 or not self.is_auto:
                raise StillhouseError(Reason.OUT_OF_MEMORY, problem)
            max_tokens = rows // 2 * largest.longest
            log.info("a largest pass does not fit", rows=rows, row_tokens=largest.longest, tried=max_tokens)

    def _problem(self, largest: LargestPass, rows: int, per_token: float) -> str:
        """The sentence about a pass that does not fit; empty if it does."""
        device = self.stepper.device
        tokens = rows * largest.longest
        free = (self.free_bytes or free_bytes)(device)
        needed = per_token * tokens + self._update_bytes()
        told = (
            f"The run's largest forward and backward pass has {rows} {'row' if rows == 1 else 'rows'} of {largest.longest} "
            f"tokens, {tokens} tokens in all"
        )
        remedy = "Lower data.max_sequence_tokens, set student.gradient_checkpointing: true, train an adapter, or use more memory."
        if rows > 1:
            remedy = "Lower optimizer.micro_batch_tokens, or leave it out so that the run finds what fits."
        if per_token and needed > SHARE * free:
            return f"{told}, for which it needs about {_said(needed)} of memory; {_said(free)} are free. {remedy}"
        if per_token and device.type == "cpu" and self._fits_certainly(largest, rows, per_token, free):
            return ""
        try:
            with _same_draws(device):
                self.stepper.rehearse([stretched(largest.sample, largest.longest)] * rows)
        except Exception as error:
            if memory_cause(error) is None:
                raise
            about = f"about {_said(needed)} for it" if per_token else "its activations"
            return f"{told}, and memory ran out ({first_line(error)}): {_said(free)} were free, {about}. {remedy}"
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return ""

    def _fits_certainly(self, largest: LargestPass, rows: int, per_token: float, free: int) -> bool:
        """True if the pass fits even if all that was measured grows with the square of a row's tokens, as attention may."""
        bound = per_token * rows * largest.longest * largest.longest / sum(SHORT_LENGTHS)
        return bound + self._update_bytes() + BUFFER_BYTES <= SHARE * free

    def _update_bytes(self) -> int:
        """Bytes of gradients and, before the first update, of the optimizer's states."""
        weights = sum(each.numel() for each in self.stepper.parameters)
        return weights * (4 + (0 if self.stepper.has_optimizer_state else self.state_bytes))

    def _bytes_per_token(self, sample: ScoredExample) -> float:
        """Bytes of activations that the backward pass of one more token needs."""
        short, long = (self._kept_bytes(stretched(sample, length)) for length in SHORT_LENGTHS)
        return max(0.0, (long - short) / (SHORT_LENGTHS[1] - SHORT_LENGTHS[0]))

    def _kept_bytes(self, row: ScoredExample) -> int:
        """Bytes that a pass keeps for its backward pass, weights left out."""
        weights = {each.untyped_storage().data_ptr() for each in self.stepper.weights()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            _same_draws(self.stepper.device),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each),
        ):
            self.stepper.rehearse([row])
        return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Memory that a process may still take on a device: that of the machine, its control group and its own limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = [int(psutil.virtual_memory().available)]
    group = Path("/sys/fs/cgroup")
    try:
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        # Pages of files can be dropped.
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(most - used + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no control group of version 2, or none with a limit
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    if own != resource.RLIM_INFINITY:
        found.append(own - int(psutil.Process().memory_info().vms))
    return max(0, min(found))


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """Leaves the random numbers behind the block as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _said(size_bytes: float) -> str:
    if size_bytes < 2**30:
        return f"{size_bytes / 2**20:.0f} MiB"
    return f"{size_bytes / 2**30:.1f} GiB"
