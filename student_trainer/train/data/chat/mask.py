"""Masks conversations to what the assistant writes: its turns, each with the token that ends it.

A turn is learnt only as it was written: one that the template rewrites once turns follow, such as by removing its
thoughts, is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any, Literal, NamedTuple

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.chat_template import STAND_IN
from stillhouse.student_trainer.train.data.chat.marks import SpecialMarks, TurnEnds, common_length
from stillhouse.student_trainer.train.data.chat.template import ChatTemplate, Conversation, Rendered

OWN_STAND_IN = STAND_IN[::-1]
"""Stand-in for the assistant's text."""
MAX_CHECKED = 4096
"""Shapes of conversations whose blocks are checked once; those beyond are checked each time."""
_THOUGHTS_END = "</think>"
Note = Literal["rewritten_turns", "unprompted_turns", "unended_turns"]
Span = tuple[int, int]


class Learned(NamedTuple):
    """Knowledge from the rows so far about the template and its marks, on which the masks of later rows depend."""

    marks: tuple[str, ...] = ()
    """Tokens that end turns, though the tokenizer does not call them special."""
    turn_ends: tuple[tuple[str, TurnEnds], ...] = ()
    """The ends of turns by source of a template, sorted."""


class ChatMasker:
    """Renders conversations for one tokenizer and finds what the assistant writes in them."""

    def __init__(self, tokenizer: Any, marks: SpecialMarks, *, today: date | None = None) -> None:
        """`tokenizer` is a fast tokenizer of transformers, `marks` are its own; templates are told `today`."""
        self.template = ChatTemplate(tokenizer, today=today)
        """The tokenizer's chat template."""
        self._marks = marks
        self._eos: str = tokenizer.eos_token if marks.holds(tokenizer.eos_token_id) else ""
        self._turn_ends: dict[str, TurnEnds] = {}
        self._checked: set[object] = set()
        self.end_ids: set[int] = set()
        """Tokens that ended a turn so far."""
        self.notes: Counter[Note] = Counter()
        """Turns so far that are left out since the template rewrites them, that do not begin with the template's
        generation prompt, and that end with no token."""

    @property
    def learned(self) -> Learned:
        """Knowledge from the rows so far."""
        return Learned(self._marks.learned, tuple(sorted(self._turn_ends.items(), key=lambda each: each[0])))

    @learned.setter
    def learned(self, told: Learned) -> None:
        if told != self.learned:
            self._marks.learned = told.marks
            self._turn_ends = dict(told.turn_ends)

    def render(self, conversation: Conversation, *, is_cut: bool = False) -> tuple[str, list[Span]]:
        """Returns the text of a conversation and the characters of the assistant's turns, ascending.

        With `is_cut` the last turn was truncated when it was generated: it has no end. Raises
        StillhouseError(DATASET_INVALID).
        """
        if self.template.marks_generation(conversation):
            text, spans, has_last = self._marked(conversation)
        else:
            text, spans, has_last = self._found(conversation)
        is_cut = is_cut and has_last
        if is_cut:
            spans[-1] = (spans[-1][0], self._without_end(text, spans[-1], self._ends_of(conversation)))
            text = text[: spans[-1][1]]
        for begin, stop in spans:
            mark = self._marks.at_end(text[begin:stop].rstrip())
            if mark:
                self.end_ids.add(self._marks.token_id(mark))
            elif not (is_cut and stop == len(text)):
                self.notes["unended_turns"] += 1
        return text, spans

    def _marked(self, conversation: Conversation) -> tuple[str, list[Span], bool]:
        """Returns the text, the spans that the template's author marked, and True if the last turn is among them."""
        text, found = self.template.render(conversation, marks=True)
        self._check_marks(conversation)
        spans = _joined([(begin, stop) for begin, stop in found if begin < stop])
        lost = self._rewritten(conversation, text, spans) | self._untrained(conversation, spans)
        learnt = [span for span in spans if span not in lost]
        return text, learnt, bool(learnt) and learnt[-1] == spans[-1]

    def _check_marks(self, conversation: Conversation) -> None:
        """Returns if the blocks hold the assistant's text and nobody else's. Raises StillhouseError(DATASET_INVALID)."""
        shape = tuple((each["role"], each.get("content") is None) for each in conversation.messages)
        if (shape, bool(conversation.tools)) in self._checked:
            return
        probe = self._try(_with_stand_ins(conversation), marks=True)
        if probe is None:  # it depends on these words
            return
        text, spans = probe
        marked = "".join(text[begin:stop] for begin, stop in spans)
        if STAND_IN in marked or (spans and OWN_STAND_IN in text and OWN_STAND_IN not in marked):
            raise conversation.row.invalid(
                "messages",
                "is rendered with {% generation %} blocks around other text than the assistant's, which would be learnt in its place. "
                "Put the assistant's text alone into the blocks of the student's chat template, and no block into a macro.",
            )
        if len(self._checked) < MAX_CHECKED:
            self._checked.add((shape, bool(conversation.tools)))

    def _rewritten(self, conversation: Conversation, text: str, spans: Sequence[Span]) -> set[Span]:
        """Returns the spans of turns that had another text when they were the last."""
        turns = _assistant_turns(conversation)
        if len(turns) < 2:
            return set()
        written: set[str] = set()
        for index in turns:
            until: Rendered | None = Rendered(text, spans)
            if index < len(conversation.messages) - 1:
                until = self._try(conversation.first(index + 1), marks=True)
            before = self._try(conversation.first(index)) if index else Rendered("")
            if until is None or before is None:
                return set()  # the template renders whole conversations alone
            rendered, found = until
            own = common_length(rendered, before.text)
            # A turn may end in another way where it is the last.
            texts = (rendered[begin:stop] for begin, stop in _joined(found) if begin >= own)
            written |= {self._marks.without(each) for each in texts}
        lost = {span for span in spans if self._marks.without(text[slice(*span)]) not in written}
        self.notes["rewritten_turns"] += len(lost)
        return lost

    def _untrained(self, conversation: Conversation, spans: Sequence[Span]) -> set[Span]:
        """Returns the spans of turns that are not to be learnt."""
        trained = [conversation.trained[index] for index in _assistant_turns(conversation)]
        if all(trained):
            return set()
        if len(spans) != len(trained):
            raise conversation.row.invalid(
                "messages",
                f"has {len(trained)} turns of the assistant, of which the chat template marks {len(spans)}, so the turns "
                "of weight 0 cannot be told apart. Give one assistant turn per row.",
            )
        return {span for span, is_trained in zip(spans, trained, strict=True) if not is_trained}

    def _found(self, conversation: Conversation) -> tuple[str, list[Span], bool]:
        """Returns the text, the spans of the turns, found by rendering the conversation up to each, and True if the last of
        them is the assistant's last."""
        text, ends = self.template.render(conversation).text, self._ends_of(conversation)
        spans, last, turns = [], len(conversation.messages) - 1, _assistant_turns(conversation)
        has_last = False
        for index in (each for each in turns if conversation.trained[each]):
            part = Rendered(text) if index == last else self._try(conversation.first(index + 1))
            until = part.text.removesuffix(ends.tail) if part else ""
            if not part or not text.startswith(until):
                self.notes["rewritten_turns"] += 1
                continue
            begin = self._begin(conversation, index, text, len(until))
            if begin is None:
                if index < last:
                    self.notes["rewritten_turns"] += 1
                    continue
                raise conversation.row.invalid(
                    f"messages[{index}]",
                    "cannot be found in the rendered conversation, since the student's chat template rewrites the turns before "
                    "it. Give a chat template with {% generation %} blocks, or prompt and completion.",
                )
            self._check_content(conversation, index, text, text[begin : len(until)])
            if index == last and not self._ending(text, begin, len(until)):
                text = until + self._end_to_append(conversation, until, ends)
            spans.append((begin, self._ending(text, begin, len(until)) or len(until)))
            has_last = index == turns[-1]
        return text, spans, has_last

    def _check_content(self, conversation: Conversation, index: int, text: str, turn: str) -> None:
        """Returns if a turn holds its content. Raises StillhouseError(DATASET_INVALID)."""
        content = str(conversation.messages[index].get("content") or "").strip()
        if content and content not in turn and self._content_begin(conversation, index, text) is None:
            raise conversation.row.invalid(
                f"messages[{index}].content",
                "leaves no trace in the text: the student's chat template does not render it. Remove it, or take a model whose "
                "template does.",
            )

    def _begin(self, conversation: Conversation, index: int, text: str, until: int) -> int | None:
        """Returns the offset of an assistant's first character, after its prompt; None if it cannot be found."""
        if not index:
            return self._content_begin(conversation, index, text)
        earlier = self._try(conversation.first(index))
        history = earlier.text.removesuffix(self._ends_of(conversation).tail) if earlier else None
        prompt = self._try(conversation.first(index), generation_prompt=True)
        before = prompt.text if prompt else None
        if earlier is not None and before == earlier.text:
            before = history  # the template has no generation prompt
        if before is not None and text.startswith(before) and len(before) <= until:
            if before != history or not text[len(before) : until].strip():
                return len(before)
            # Without a generation prompt there is a role's name, or nothing, before the assistant's text.
            begin = self._content_begin(conversation, index, text)
            is_name = begin is not None and text[len(before) : begin].strip()
            return begin if is_name else len(before)
        begins = [self._content_begin(conversation, index, text)]
        common = 0 if before is None else min(common_length(before, text), until)
        if history is not None and text.startswith(history) and common >= len(history):
            # The prompt begins as the turn does, and goes on in another way, such as with an empty thought. One that is no
            # continuation of the turns before tells nothing.
            begins.append(self._marks.border_before(text, common))
        self.notes["unprompted_turns"] += 1
        self._check_order(conversation.first(index + 1))
        return min((begin for begin in begins if begin is not None), default=None)

    def _check_order(self, conversation: Conversation) -> None:
        """Returns if no other turn stands behind the last one. Raises StillhouseError(DATASET_INVALID)."""
        has_text = isinstance(conversation.messages[-1].get("content"), str)
        probe = self._try(_with_stand_ins(conversation)) if has_text else None
        if probe and OWN_STAND_IN in probe.text and STAND_IN in probe.text.rpartition(OWN_STAND_IN)[2]:
            raise conversation.row.invalid(
                f"messages[{len(conversation.messages) - 1}]",
                "is rendered before turns that precede it, so their text would be learnt with it. Correct the student's chat "
                "template, or give prompt and completion.",
            )

    def _try(self, conversation: Conversation, **options: bool) -> Rendered | None:
        """Renders a part of a conversation, or a changed one; None if the template refuses it."""
        try:
            return self.template.render(conversation, **options)
        except StillhouseError:
            return None

    def _content_begin(self, conversation: Conversation, index: int, text: str) -> int | None:
        """Returns the offset of a turn's content in `text`; None if the template does not copy it."""
        content = conversation.messages[index].get("content")
        if not isinstance(content, str):
            return None
        # Some templates drop thoughts, with all that is before their end.
        thoughts, end, _ = content.rpartition(_THOUGHTS_END)
        for before in dict.fromkeys(("", thoughts + end)):
            changed = before + STAND_IN + content[len(before) :]
            rendered = self._try(_with_content(conversation, index, changed))
            begin, found, _ = rendered.text.partition(STAND_IN) if rendered else ("", "", "")
            if found and text.startswith(begin):
                return len(begin)
        return None

    def _ending(self, text: str, begin: int, until: int) -> int:
        """Returns the offset behind the token that ends the turn in [begin, until), or behind the next one; 0 if none does."""
        # The line break that templates put after the end token opens the next turn; no model generates it.
        written = text[begin:until].rstrip()
        if self._marks.at_end(written):
            return begin + len(written)
        following = text[until:]
        opening = following.lstrip()
        mark = self._marks.at_start(opening)
        return until + len(following) - len(opening) + len(mark) if mark else 0

    def _end_to_append(self, conversation: Conversation, text: str, ends: TurnEnds) -> str:
        """Returns the text that ends a last turn which the template leaves open: the next turn's opening, or the end token."""
        calls = conversation.messages[-1].get("tool_calls")
        following = {"role": "tool" if calls else "user", "content": STAND_IN}
        longer = self._try(replace(conversation, messages=[*conversation.messages, following]))
        rendered = longer.text if longer else ""
        after = rendered[len(text) :] if rendered.startswith(text) else ends.next_opening
        mark = self._marks.at_start(after.lstrip())
        return after[: after.index(mark) + len(mark)] if mark else self._eos

    def _without_end(self, text: str, span: Span, ends: TurnEnds) -> int:
        """Returns the offset behind the last character that the assistant wrote itself."""
        whole = text[span[0] : span[1]]
        written = ends.written(whole, self._eos)
        mark = self._marks.at_end(written.rstrip()) if written == whole else ""
        return span[0] + len(written.rstrip().removesuffix(mark) if mark else written)

    def _ends_of(self, conversation: Conversation) -> TurnEnds:
        source = self.template.source(conversation.tools)
        if source not in self._turn_ends:
            self._turn_ends[source] = TurnEnds.probe(self.template, conversation, self._marks)
        return self._turn_ends[source]


def _assistant_turns(conversation: Conversation) -> list[int]:
    return [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Joins spans that touch: parts of one turn."""
    joined: list[Span] = []
    for begin, stop in spans:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((begin, stop))
    return joined


def _with_content(conversation: Conversation, index: int, content: str) -> Conversation:
    messages: list[Mapping[str, Any]] = list(conversation.messages)
    messages[index] = {**messages[index], "content": content}
    return replace(conversation, messages=messages)


def _with_stand_ins(conversation: Conversation) -> Conversation:
    """Puts a stand-in into the middle of every turn's text, another one for the assistant's."""
    changed = conversation
    for index, message in enumerate(conversation.messages):
        content = message.get("content")
        if isinstance(content, str):
            middle = len(content) // 2
            stand_in = OWN_STAND_IN if message["role"] == "assistant" else STAND_IN
            changed = _with_content(changed, index, content[:middle] + stand_in + content[middle:])
    return changed
