"""Names of the target forms of a loss, which run files write and training builds."""

from __future__ import annotations

from typing import Literal

TargetForm = Literal[
    "tail_bucket",
    "sampled",
    "top_k_and_sampled",
    "sampled_tail",
    "stratified_tail",
    "student_tail",
    "renormalise",
]
