"""Tokenizes a row (chat template or plain) with the student's tokenizer and builds its loss mask.

mask[t] is True if token t is a target, predicted from the tokens before it; position 0 never is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.known_fields import ExtraFields
from stillhouse.protos.rows.training_row import TrainingRow
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.train.data.alignment import AlignedText
from stillhouse.student_trainer.train.data.chat.mask import ChatMasker
from stillhouse.student_trainer.train.data.readers import DatasetRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One training sequence."""

    token_ids: NDArray[np.int32]
    """[T]."""
    mask: NDArray[np.bool_]
    """[T]: True for targets; at least one, never the first."""
    place: str
    """File and row, for errors."""
    num_prompt: int | None = None
    """Prompt tokens that a generated completion continues; None: all tokens before the first target."""
    teacher: str = ""
    """Name of the row's teacher; empty if rows name none."""
    aligned: AlignedText | None = None
    """The text in the tokens of a teacher with another tokenizer; None if both tokenizers agree."""

    @property
    def teacher_tokens(self) -> tuple[NDArray[np.int32], int]:
        """Token ids and first position of the teacher query."""
        if self.aligned is not None:
            return self.aligned.token_ids, self.aligned.start
        return self.token_ids, self.start

    @property
    def start(self) -> int:
        """Index of the first target, >= 1: the first queried position."""
        return int(np.argmax(self.mask))

    @property
    def prompt(self) -> NDArray[np.int32]:
        """Token ids that a generated completion continues, at least one."""
        return self.token_ids[: self.start if self.num_prompt is None else self.num_prompt]

    @property
    def num_targets(self) -> int:
        """Number of tokens trained on."""
        return int(self.mask.sum())


def num_prompt_tokens(completion_mask: Sequence[bool]) -> int:
    """Returns the start of a row's last completion, >= 1."""
    begins = [
        at for at, inside in enumerate(completion_mask) if inside and not (at and completion_mask[at - 1])
    ]
    return max(1, begins[-1]) if begins else 1


class RowEncoder:
    """Encodes rows with one tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        completion_only: bool,
        chat: bool = False,
        extra_fields: ExtraFields = "keep",
        own_fields: Collection[str] = (),
    ) -> None:
        """`chat`, `extra_fields` and `own_fields` are those of `parse_training_row`.

        Raises StillhouseError(TOKENIZER_INVALID) unless `tokenizer` is a fast tokenizer of transformers.
        """
        if not tokenizer.is_fast:
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The student's tokenizer {type(tokenizer).__name__} has no tokenizer.json, which exact masks need. "
                "Convert it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...).",
            )
        self._tokenizer = tokenizer
        self._completion_only = completion_only
        self._parse = partial(
            DatasetRow.parse,
            chat=chat,
            extra_fields=extra_fields,
            own_fields=own_fields,
            completion_only=completion_only,
        )
        self._chat = ChatMasker(tokenizer)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer."""
        tokenizer = self._tokenizer
        return tokenizer_fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)

    def encode(self, row: DatasetRow) -> tuple[list[int], list[bool]]:
        """Returns token ids and target mask of a row, not truncated. Raises StillhouseError(DATASET_INVALID)."""
        token_ids, completion_mask = self.encode_with_completion_mask(row)
        return token_ids, self.target_mask(completion_mask)

    def target_mask(self, completion_mask: Sequence[bool]) -> list[bool]:
        """Turns a completion mask into the mask of targets."""
        trained = completion_mask if self._completion_only else [True] * len(completion_mask)
        return [False, *trained[1:]]

    def encode_with_completion_mask(self, row: DatasetRow) -> tuple[list[int], list[bool]]:
        """Returns token ids of a row and the mask of its completions. Raises as `encode`."""
        content = self._parse(row)
        if content.turns is not None:
            return self._chat.encode(self._chat.template.conversation(row, content.turns))
        if content.kind == "completion":
            return self._encode_completion(content)
        token_ids = self._ids(content.text, special=True)
        return token_ids, [True] * len(token_ids)

    def _encode_completion(self, row: TrainingRow) -> tuple[list[int], list[bool]]:
        """Encodes prompt and completion separately, as at inference, and appends the end token."""
        prompt = self._ids(row.prompt, special=True)
        completion = self._ids(row.completion, special=False)
        end = self._tokenizer.eos_token_id
        if end is not None:
            # Some tokenizers end every text; an ended prompt cannot be continued.
            prompt = prompt[:-1] if prompt and prompt[-1] == end else prompt
            completion = completion if completion and completion[-1] == end else [*completion, end]
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])
