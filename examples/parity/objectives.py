"""The objectives of sequence-level f-divergence distillation, each as contexts and a divergence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from examples.parity.rows import row
from examples.parity.system0 import last
from examples.parity.world import World

SHORT: Mapping[str, Any] = {"max_new_tokens": 16}
TEACHER = {"teacher": {"generation": SHORT}}
ANY_START = {"min_teacher_logprob": -100}
"""These students have learnt nothing; a real one starts warm, which the default asks for."""
STUDENT = {"student": {"generation": SHORT, **ANY_START}}


def shown(world: World, metric: str = "train/loss", **changes: Any) -> str:
    """A run of two steps, and its loss."""
    handle = world.complete(**changes)
    return f"run {handle.id}, {metric} {last(handle, metric):.3f}"


@row("seqkd", "cross-entropy on the teacher's text")
def seqkd(world: World) -> str:
    loss = {"terms": [{"divergence": "forward_kl", "weight": 0}], "hard_weight": 1}
    return shown(world, contexts=[TEACHER], loss=loss)


@row("engine", "the teacher's log-probabilities of greedy student text")
def engine(world: World) -> str:
    greedy = {"student": {"generation": {**SHORT, "top_p": 0.001}, **ANY_START}}
    return shown(world, contexts=[greedy], loss={"terms": [{"divergence": "reverse_kl"}]})


@row("kl", "forward KL on the teacher's text, stored or written during the run")
def forward(world: World) -> str:
    stored = shown(world)
    return f"{stored}; {shown(world, contexts=[TEACHER])}"


@row("rkl", "reverse KL on the student's text")
def reverse(world: World) -> str:
    sampled = {"student": {"generation": {**SHORT, "top_p": 0.9}, **ANY_START}}
    return shown(world, contexts=[sampled], loss={"terms": [{"divergence": "reverse_kl"}]})


@row("js", "the two halves of the Jensen-Shannon divergence, each on its own text")
def jensen_shannon(world: World) -> str:
    # With weight b of the student in m = b q + (1-b) p: (1-b) KL(p||m) on the teacher's text, b KL(q||m) on the student's.
    student_share = 0.85
    on_teacher = {"terms": [{"divergence": "skew_kl", "alpha": 1 - student_share}]}
    on_student = {"terms": [{"divergence": "skew_reverse_kl", "alpha": student_share}]}
    return shown(
        world,
        contexts=[
            {**TEACHER, "weight": 1 - student_share, "loss": on_teacher},
            {**STUDENT, "weight": student_share, "loss": on_student},
        ],
    )


@row("tvd", "half of the total variation distance on each text")
def total_variation(world: World) -> str:
    return shown(
        world,
        contexts=[{**TEACHER, "weight": 0.5}, {**STUDENT, "weight": 0.5}],
        loss={"terms": [{"divergence": "tvd"}]},
    )


@row("pre", "a student of the teacher's layers, KL and cross-entropy as a warm start")
def pre_distillation(world: World) -> str:
    return shown(
        world,
        student={"model": str(world.base), "keep_layers": [0]},
        loss={"terms": [{"divergence": "forward_kl", "weight": 0.8}], "hard_weight": 0.2, "temperature": 2},
    )
