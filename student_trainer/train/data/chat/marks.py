"""Special tokens in rendered text, and the way in which a chat template ends the assistant's turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.chat_template import STAND_IN
from stillhouse.student_trainer.train.data.chat.template import ChatTemplate, Conversation


class SpecialMarks:
    """Special tokens by their text that may end one: also those without a role of the tokenizer, such as a model's own turn marks."""

    def __init__(self, tokenizer: Any) -> None:
        # A settings file may name special tokens that the vocabulary lacks.
        vocabulary = tokenizer.get_vocab()
        self._ids: dict[str, int] = {
            token: vocabulary[token] for token in tokenizer.all_special_tokens if token in vocabulary
        }
        added = tokenizer.added_tokens_decoder
        self._ids |= {str(token): number for number, token in added.items() if token.special}
        self._whole = (*self._ids, *map(str, added))
        # These begin texts or stand for nothing; they end none, unless the tokenizer ends texts with the same token.
        roles = (getattr(tokenizer, f"{role}_token", None) for role in ("bos", "unk", "cls", "mask"))
        never = {"", *(str(role) for role in roles if role)} - {str(tokenizer.eos_token)}
        self._ids = {token: number for token, number in self._ids.items() if token not in never}
        self._added = {str(token): number for number, token in added.items() if str(token) not in never}
        self._given = dict(self._ids)
        self._index()

    @property
    def learned(self) -> tuple[str, ...]:
        """Marks that `learn_end` has added, sorted."""
        return tuple(sorted(self._ids.keys() - self._given.keys()))

    @learned.setter
    def learned(self, marks: Sequence[str]) -> None:
        self._ids = self._given | {mark: self._added[mark] for mark in marks}
        self._index()

    def at_end(self, text: str) -> str:
        """Returns the longest mark that `text` ends with; empty if there is none."""
        return next((text[-n:] for n in self._lengths if text[-n:] in self._ids), "")

    def at_start(self, text: str) -> str:
        """Returns the longest mark that `text` begins with; empty if there is none."""
        return next((text[:n] for n in self._lengths if text[:n] in self._ids), "")

    def token_id(self, mark: str) -> int:
        """Returns the token id of a mark."""
        return self._ids[mark]

    def holds(self, token_id: int | None) -> bool:
        """Returns True for the id of a mark."""
        return token_id in self._known

    def border_before(self, text: str, at: int) -> int:
        """Returns `at`, or the beginning of the token with a text of its own that it would cut, which may be no mark."""
        longest = max(map(len, self._whole), default=1)
        for begin in range(max(0, at - longest + 1), at):
            if any(text.startswith(each, begin) and at < begin + len(each) for each in self._whole):
                return begin
        return at

    def without(self, text: str) -> str:
        """Returns `text` without the marks and the white space at its end."""
        text = text.rstrip()
        while mark := self.at_end(text):
            text = text.removesuffix(mark).rstrip()
        return text

    def learn_end(self, closing: str) -> None:
        """Counts the token that `closing` begins with as a mark, though the tokenizer does not call it special."""
        written = closing.lstrip()
        found = max((each for each in self._added if written.startswith(each)), key=len, default="")
        if found:
            self._ids[found] = self._added[found]
            self._index()

    def _index(self) -> None:
        self._known = frozenset(self._ids.values())
        self._lengths = sorted({len(each) for each in self._ids}, reverse=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnEnds:
    """The text that a template puts behind an assistant's turn."""

    closing: str = ""
    """Belongs to the turn; empty if the next turn's opening ends it, or nothing does."""
    tail: str = ""
    """Follows only the last turn of a conversation."""
    next_opening: str = ""
    """From the end of an assistant's text to the user's next."""

    def written(self, text: str, eos: str) -> str:
        """Returns a turn's `text` without its end, of which `eos` may be a part that the template does not have."""
        for end in (self.closing + self.tail, self.closing + eos, self.closing, self.closing.rstrip()):
            if end and text.endswith(end):
                return text.removesuffix(end)
        return text

    @classmethod
    def probe(cls, template: ChatTemplate, conversation: Conversation, marks: SpecialMarks) -> TurnEnds:
        """Finds them with a short conversation; all empty if the template refuses it."""
        own, user = f"{STAND_IN}a", f"{STAND_IN}u"
        turns = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": own},
            {"role": "user", "content": user},
        ]
        row = conversation.row
        try:
            last = template.render(Conversation(row=row, messages=turns[:2])).text
            followed = template.render(Conversation(row=row, messages=turns)).text
        except StillhouseError:
            return cls()
        if own not in last or own not in followed or user not in followed.partition(own)[2]:
            return cls()
        after, between = last.partition(own)[2], followed.partition(own)[2].partition(user)[0]
        marks.learn_end(between)
        common = marks.border_before(after, common_length(after, between))
        return cls(closing=after[:common], tail=after[common:], next_opening=between)


def common_length(one: str, other: str) -> int:
    """Returns the number of characters with which both begin."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)
