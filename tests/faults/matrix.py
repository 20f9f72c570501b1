"""The fault matrix: every fault that Stillhouse must survive, and how it must end; each row has at least one test.

A test names its row with `@pytest.mark.faults(row=N)`. `make test-faults` runs them all and prints what became of each row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One fault and the end that it must come to."""

    number: int
    fault: str
    ends: str


def _row(number: int, fault: str, ends: str) -> Row:
    return Row(number=number, fault=fault, ends=ends)


ROWS = tuple(
    _row(number, fault, ends)
    for number, (fault, ends) in enumerate(
        [
            ("the teacher is killed amid a stream", "only what is unanswered is asked again; equal weights"),
            ("vLLM's engine process dies, its front lives", "not serving within 2 s, then an exit code"),
            ("the teacher hangs", "the run waits, says so, and goes on; no failure before teacher_wait_s"),
            ("the teacher is slow", "bounded prefetch and memory; the wait is measured"),
            ("the network is cut and heals", "noticed without a reset; nothing trained twice or skipped"),
            ("another teacher comes back", "refused by its fingerprint: weights, adapter, quantisation"),
            ("the training process is killed anywhere", "on from the last whole checkpoint, bit for bit"),
            ("the training process runs out of memory", "137 is classified, with advice; one halved retry"),
            ("the run service is killed", "runs go on and are adopted; no state lost or doubled"),
            ("a disk is full", "the last checkpoint whole, a clear state, reads still answered"),
            ("a cache shard is damaged", "noticed before it is learnt from; asked again or named"),
            ("a run is submitted again", "one run, whoever lost whose reply"),
            ("malformed, oversized or endless requests", "refused; the service lives in bounded memory"),
            ("hostile paths, ids and weights", "refused before they are opened"),
            ("no token, a wrong one, a wrong authority", "refused with the right code"),
            ("another tokenizer or vocabulary", "refused at the start, or its shared prefix is used"),
            ("the teacher's logits are non-finite", "that item alone fails; the run skips and counts it"),
            ("the student's loss is non-finite", "skipped; after three in a row FAILED with the checkpoint"),
            ("token ids that cannot be", "refused with their index; the engine lives"),
            ("two trainers, one teacher", "fair shares; one's flood or cancellation leaves the other alone"),
            (
                "the clock jumps, a stale attempt wakes up",
                "waits are not of that clock; the stale one is fenced",
            ),
            ("SIGTERM to each service", "drains and exits with 0; a second one hastens"),
            (
                "anything is killed at any moment",
                "the curve and weights of the undisturbed run, a legal history",
            ),
        ],
        start=1,
    )
)
"""In the order of their numbers."""
