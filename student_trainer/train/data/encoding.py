"""From a row of text to token ids and the mask of what is learnt; the student's tokenizer and chat template alone decide.

A mask speaks of positions of the sequence: mask[t] says that token t is a target, predicted from the tokens before it.
Position 0 is never one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.train.data.alignment import ForeignText
from stillhouse.student_trainer.train.data.readers import Row

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sequence to learn from."""

    token_ids: NDArray[np.int32]
    """[T]."""
    mask: NDArray[np.bool_]
    """[T]: which tokens are targets; at least one, never the first."""
    place: str
    """File and row that it comes from, for errors."""
    num_prompt: int | None = None
    """Tokens of the prompt that a generated completion continues; None: those before the first target."""
    teacher: str = ""
    """Name of the row's teacher; empty where rows name none."""
    foreign: ForeignText | None = None
    """The text in the tokens of a teacher with a tokenizer of its own; None where ids mean the same to both."""

    @property
    def asked(self) -> tuple[NDArray[np.int32], int]:
        """Token ids and first position that the teacher is asked about."""
        if self.foreign is not None:
            return self.foreign.token_ids, self.foreign.start
        return self.token_ids, self.start

    @property
    def start(self) -> int:
        """The first target, >= 1: where a teacher's answer begins."""
        return int(np.argmax(self.mask))

    @property
    def prompt(self) -> NDArray[np.int32]:
        """What a generated completion continues, at least one token."""
        return self.token_ids[: self.start if self.num_prompt is None else self.num_prompt]

    @property
    def num_targets(self) -> int:
        """Tokens that are learnt from."""
        return int(self.mask.sum())


def num_prompt_tokens(written: Sequence[bool]) -> int:
    """Where the last completion of a row begins, >= 1, from the mask of what completions wrote."""
    begins = [at for at, wrote in enumerate(written) if wrote and not (at and written[at - 1])]
    return max(1, begins[-1]) if begins else 1


class Encoder:
    """Encodes rows with one tokenizer; checks that it can."""

    def __init__(self, tokenizer: Any, *, completion_only: bool) -> None:
        """`tokenizer` is a fast tokenizer of transformers. Raises StillhouseError(TOKENIZER_INVALID) for a slow one."""
        if not tokenizer.is_fast:
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The student's tokenizer {type(tokenizer).__name__} has no tokenizer.json, which exact masks need. "
                "Convert it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...).",
            )
        self._tokenizer = tokenizer
        self._completion_only = completion_only
        self._marks_generation = bool(_GENERATION_BLOCK.search(tokenizer.chat_template or ""))

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer."""
        tokenizer = self._tokenizer
        return tokenizer_fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)

    def encode(self, row: Row) -> tuple[list[int], list[bool]]:
        """Token ids and mask of a row, not cut. Raises StillhouseError(DATASET_INVALID) for a row that cannot be."""
        token_ids, written = self.mark(row)
        return token_ids, self.targets(written)

    def targets(self, written: Sequence[bool]) -> list[bool]:
        """The mask of what is learnt, from that of what completions wrote."""
        learnt = written if self._completion_only else [True] * len(written)
        return [False, *learnt[1:]]

    def mark(self, row: Row) -> tuple[list[int], list[bool]]:
        """Token ids of a row, and which of them a completion wrote. Raises as `encode`."""
        match row.kind:
            case "messages":
                token_ids, mask = self._encode_messages(row)
            case "completion":
                token_ids, mask = self._encode_completion(row)
            case _:
                token_ids = self._encode_text(row)
                mask = [True] * len(token_ids)
        return token_ids, mask

    def _encode_text(self, row: Row) -> list[int]:
        text = row.text("text")
        if not text:
            raise row.invalid("text", "is empty; remove the row or fill it.")
        return self._ids(text, special=True)

    def _encode_completion(self, row: Row) -> tuple[list[int], list[bool]]:
        """Prompt and completion, each encoded by itself as at inference, and the end token."""
        prompt = self._ids(row.text("prompt"), special=True)
        completion = self._ids(row.text("completion"), special=False)
        end = self._tokenizer.eos_token_id
        if end is not None:
            # Some tokenizers end every text; what ends a prompt cannot be continued.
            prompt = prompt[:-1] if prompt and prompt[-1] == end else prompt
            completion = completion if completion and completion[-1] == end else [*completion, end]
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    def _encode_messages(self, row: Row) -> tuple[list[int], list[bool]]:
        messages = _check_messages(row)
        if not self._tokenizer.chat_template:
            raise row.invalid(
                "messages",
                "needs a chat template, which the student's tokenizer lacks; give prompt and completion.",
            )
        if self._marks_generation:
            encoded = self._render(
                row, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(encoded["input_ids"]), [bool(each) for each in encoded["assistant_masks"]]
        text = self._render(row, messages, tokenize=False)
        spans = [
            self._turn_span(row, messages, index, text)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # Tokenizers may leave white space out of an offset's start, never out of its end, if it is all there is.
        ends = [end for _, end in encoded["offset_mapping"]]
        mask = [any(begin < end <= stop for begin, stop in spans) for end in ends]
        return list(encoded["input_ids"]), mask

    def _turn_span(
        self, row: Row, messages: Sequence[Mapping[str, Any]], index: int, text: str
    ) -> tuple[int, int]:
        """Characters [begin, stop) of the rendered conversation that an assistant's turn wrote, its end mark included."""
        before = (
            self._render(row, messages[:index], tokenize=False, add_generation_prompt=True) if index else ""
        )
        until = self._render(row, messages[: index + 1], tokenize=False)
        if not (text.startswith(until) and until.startswith(before)):
            raise row.invalid(
                f"messages[{index}]",
                "is rendered differently when turns follow, so that what the assistant wrote cannot be told from the "
                "rest. Give one assistant turn per row, at the end, or a chat template with {% generation %} blocks.",
            )
        # The line break that templates put behind the end mark opens the next turn; no model writes it.
        written = until.rstrip()
        ends_with_mark = any(written.endswith(str(mark)) for mark in self._tokenizer.all_special_tokens)
        return len(before), len(written) if ends_with_mark else len(until)

    def _render(self, row: Row, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        # The template is Jinja code of the model's author and may raise what it likes about roles and their order.
        try:
            return self._tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:
            raise row.invalid("messages", f"is refused by the student's chat template: {error}") from error

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])


def _check_messages(row: Row) -> list[Mapping[str, Any]]:
    messages = row.values["messages"]
    if not isinstance(messages, list) or not messages:
        raise row.invalid("messages", "must be a list of at least one message.")
    for index, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise row.invalid(f"messages[{index}].{name}", "is missing or no string.")
    if not any(message["role"] == "assistant" for message in messages):
        raise row.invalid("messages", 'has no turn with role "assistant", so there is nothing to learn.')
    return messages
