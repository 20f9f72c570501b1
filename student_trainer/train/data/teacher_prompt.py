"""The prompt that a teacher alone sees: tokens in the place of those that the student sees before its completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """One teacher's prompt of one row. Position t of the student is position `shift + t` of the teacher."""

    token_ids: NDArray[np.int32]
    """[P], at least one."""
    replaces: int
    """The student's tokens [0, replaces) are not seen by the teacher; 0 where the student has no prompt."""

    @property
    def shift(self) -> int:
        """Tokens that the teacher sees more than the student."""
        return len(self.token_ids) - self.replaces

    def before(self, token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """The teacher's tokens for the student's `token_ids` [T], T >= replaces: [T + shift]."""
        return np.concatenate([self.token_ids, token_ids[self.replaces :]])


def prompt_of(prompts: Mapping[str, TeacherPrompt], teacher: str) -> TeacherPrompt | None:
    """The prompt that `teacher`, by its name, sees alone; None if it sees the student's.

    Prompts out of a cache of one unnamed teacher, and those for one, are any teacher's.
    """
    if teacher in prompts:
        return prompts[teacher]
    if "" in prompts:
        return prompts[""]
    return next(iter(prompts.values())) if not teacher and len(prompts) == 1 else None
