"""Finds the tokens that the assistant writes in a rendered conversation: its turns, their end tokens included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillhouse.student_trainer.train.data.chat.template import ChatTemplate, Conversation


class ChatMasker:
    """Encodes conversations with one tokenizer and masks what others write."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast tokenizer of transformers."""
        self._tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        """The tokenizer's chat template."""

    def encode(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Returns token ids of a conversation and the mask of the assistant's. Raises StillhouseError(DATASET_INVALID)."""
        if self.template.marks_generation:
            encoded = self.template.render(
                conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            mask = [bool(each) for each in encoded["assistant_masks"]]
            return list(encoded["input_ids"]), self._without_untrained(conversation, mask)
        text = self.template.render(conversation, tokenize=False)
        spans = [
            self._turn_span(conversation, index, text)
            for index, is_trained in enumerate(conversation.trained)
            if is_trained
        ]
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # Tokenizers may exclude white space from an offset's start, but never from its end, if it is all there is.
        ends = [end for _, end in encoded["offset_mapping"]]
        mask = [any(begin < end <= stop for begin, stop in spans) for end in ends]
        return list(encoded["input_ids"]), mask

    def _without_untrained(self, conversation: Conversation, mask: Sequence[bool]) -> list[bool]:
        """Returns the mask without the turns that are not to be learnt, which are its runs in order."""
        trained = [
            is_trained
            for message, is_trained in zip(conversation.messages, conversation.trained, strict=True)
            if message["role"] == "assistant"
        ]
        if all(trained):
            return list(mask)
        begins = [at for at, inside in enumerate(mask) if inside and not (at and mask[at - 1])]
        if len(begins) != len(trained):
            raise conversation.row.invalid(
                "messages",
                f"has {len(trained)} turns of the assistant, of which the chat template marks {len(begins)}, so the turns "
                "of weight 0 cannot be told apart. Give one assistant turn per row.",
            )
        kept, run = [], -1
        for at, inside in enumerate(mask):
            run += inside and not (at and mask[at - 1])
            kept.append(inside and trained[run])
        return kept

    def _turn_span(self, conversation: Conversation, index: int, text: str) -> tuple[int, int]:
        """Returns characters [begin, stop) of an assistant's turn in the rendered conversation, its end token included."""
        render = self.template.render
        before = (
            render(conversation.first(index), tokenize=False, add_generation_prompt=True) if index else ""
        )
        until = render(conversation.first(index + 1), tokenize=False)
        if not (text.startswith(until) and until.startswith(before)):
            raise conversation.row.invalid(
                f"messages[{index}]",
                "is rendered differently when turns follow, so the assistant's part cannot be found. "
                "Give one assistant turn per row, at the end, or a chat template with {% generation %} blocks.",
            )
        # The line break that templates put after the end token opens the next turn; no model generates it.
        written = until.rstrip()
        has_end_token = any(written.endswith(str(token)) for token in self._tokenizer.all_special_tokens)
        return len(before), len(written) if has_end_token else len(until)
