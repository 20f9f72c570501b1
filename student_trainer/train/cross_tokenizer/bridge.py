"""Between a student and a teacher whose tokenizers are foreign to each other: the student's text in the teacher's tokens, aligned by bytes.

The student's token ids say what the text is, so that both sides speak of the same bytes whatever was cut off or written by
a model. Special tokens are marks and no text: one that the teacher has too is its own there, an end or a beginning of
text is the teacher's own, and any other is left out and counted. Text that spells a mark stays text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.train.cross_tokenizer.token_bytes import TokenBytes
from stillhouse.student_trainer.train.data.alignment import ForeignText, Tokens, align
from stillhouse.student_trainer.train.data.encoding import Example

_VALID = re.compile("[^\udc80-\udcff]+")
"""Text between bytes that are no UTF-8, which surrogateescape turns into these characters."""
_WHITE_SPACE = np.isin(np.arange(256), np.frombuffer(b" \t\n\r", np.uint8))


@dataclass(kw_only=True, slots=True)
class Account:
    """What became of the tokens that were aligned."""

    num_targets: int = 0
    num_aligned: int = 0
    """Targets in a chunk."""
    num_chunks: int = 0
    num_inexact: int = 0
    """Texts that the teacher's tokenizer changes, so that its character offsets had to say where its tokens end."""
    marks_left_out: Counter[str] = field(default_factory=Counter)
    """Special tokens of the student that the teacher has none for."""


class Bridge:
    """From the tokens of one student to those of one teacher."""

    def __init__(
        self,
        student_json: str | bytes,
        teacher_json: str | bytes,
        *,
        student_roles: Mapping[str, Any],
        teacher_end_ids: Sequence[int],
        words: bool = False,
    ) -> None:
        """`student_roles` maps roles such as "eos_token" to tokens; `teacher_end_ids` end a text of the teacher.

        With `words` chunks end only where white space follows. Raises StillhouseError(TOKENIZER_INVALID).
        """
        self._student = TokenBytes(student_json, "student")
        self._teacher = _Encoder(teacher_json)
        self.teacher_size = self._teacher.bytes.size
        """The teacher's ids are below it."""
        self._words = words
        self._marks = _same_marks(self._student, self._teacher, student_roles, teacher_end_ids)
        self.account = Account()

    def translate(self, example: Example) -> ForeignText | None:
        """The example's text for the teacher; None if no chunk of it can be compared."""
        text = _Text.of(example, self._student)
        ids, ends, closes = (
            [*self._teacher.prefix],
            [0] * len(self._teacher.prefix),
            [True] * len(self._teacher.prefix),
        )
        missing = np.ones(len(text.content), np.bool_)
        exact, any_text = True, False
        for part in text.parts:
            if part.mark is None:
                encoded = self._teacher.encode(part.text, opens=not any_text)
                any_text = True
                exact &= encoded.exact
                ids += encoded.token_ids
                ends += [part.begin + end for end in encoded.ends]
                closes += encoded.closes
            else:
                own = self._marks.get(part.mark)
                if own is None:
                    self.account.marks_left_out[self._student.marks.get(part.mark, f"id {part.mark}")] += 1
                    continue
                if ids == self._teacher.prefix == [own]:
                    ends = [part.end]  # the text opens as the teacher's texts do
                else:
                    ids.append(own)
                    ends.append(part.end)
                    closes.append(True)
            missing[part.begin : part.end] = False
        chunks = align(
            Tokens(ends=text.ends, counts=example.mask),
            Tokens(
                ends=np.array(ends, np.int64),
                counts=np.arange(len(ids)) > 0,
                closes=np.array(closes, np.bool_),
            ),
            missing=missing,
            cuts=text.cuts,
            stops=text.word_ends if self._words else None,
        )
        account = self.account
        account.num_targets += example.num_targets
        account.num_aligned += int((chunks.student >= 0).sum())
        account.num_chunks += chunks.number
        account.num_inexact += not exact
        return ForeignText(token_ids=np.array(ids, np.int32), chunks=chunks) if chunks.number else None


class _Part(NamedTuple):
    """A piece of text that is valid UTF-8, or a mark; [begin, end) in the content."""

    begin: int
    end: int
    text: str = ""
    mark: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """What the student's tokens say."""

    content: bytes
    """With one byte for each mark."""
    ends: NDArray[np.int64]
    """Of each of the student's tokens."""
    parts: Sequence[_Part]
    """In order; bytes that are no UTF-8 are in none."""
    cuts: NDArray[np.int64]
    """Where parts begin and end, in any order."""

    @classmethod
    def of(cls, example: Example, student: TokenBytes) -> _Text:
        pieces = [student.of(int(each)) for each in example.token_ids]
        if student.drops_first_space:
            first = next((place for place, piece in enumerate(pieces) if piece is not None), None)
            if first is not None:
                pieces[first] = pieces[first].removeprefix(b" ")  # type: ignore[union-attr]
        ends = np.cumsum([1 if piece is None else len(piece) for piece in pieces])
        content = b"".join(b"\0" if piece is None else piece for piece in pieces)
        parts = list(_parts(example, pieces, ends, content))
        return cls(
            content=content,
            ends=ends,
            parts=parts,
            cuts=np.array([place for part in parts for place in (part.begin, part.end)], np.int64),
        )

    @property
    def word_ends(self) -> NDArray[np.bool_]:
        """[bytes + 1]: places that white space follows, and the end."""
        return np.append(_WHITE_SPACE[np.frombuffer(self.content, np.uint8)], True)


def _parts(
    example: Example, pieces: Sequence[bytes | None], ends: NDArray[np.int64], content: bytes
) -> Iterator[_Part]:
    """Marks, and the text between them; cut also where a completion begins or ends, as the student's tokens are."""
    borders = np.flatnonzero(example.mask[1:] != example.mask[:-1]) + 1
    stops = {place for place, piece in enumerate(pieces) if piece is None}
    begin = 0
    for place in sorted({*borders.tolist(), example.num_prompt or 0, *stops}):
        until = int(ends[place - 1]) if place else 0
        if place in stops:
            yield from _valid(content, begin, until)
            yield _Part(until, until + 1, mark=int(example.token_ids[place]))
            begin = until + 1
        elif until < len(content) and _opens(content, until):
            yield from _valid(content, begin, until)
            begin = until
    yield from _valid(content, begin, len(content))


def _opens(content: bytes, place: int) -> bool:
    """Whether no character begins before `place` and goes on there."""
    return content[place] & 0xC0 != 0x80


def _valid(content: bytes, begin: int, end: int) -> Iterator[_Part]:
    """The stretches of [begin, end) that are UTF-8."""
    decoded = content[begin:end].decode("utf-8", "surrogateescape")
    place, seen = begin, 0
    for match in _VALID.finditer(decoded):
        place += match.start() - seen  # each character that is skipped stands for one byte
        text, seen = match.group(), match.end()
        length = len(text.encode())
        yield _Part(place, place + length, text=text)
        place += length


class _Encoded(NamedTuple):
    token_ids: list[int]
    ends: list[int]
    """In bytes of the text that was given."""
    closes: list[bool]
    exact: bool


class _Encoder:
    """The teacher's tokenizer: text to ids, and where each ends."""

    def __init__(self, tokenizer_json: str | bytes) -> None:
        from tokenizers import Tokenizer

        self.bytes = TokenBytes(tokenizer_json, "teacher")
        content = tokenizer_json.decode() if isinstance(tokenizer_json, bytes) else tokenizer_json
        try:
            self._tokenizer = Tokenizer.from_str(content)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            # What opens every text, such as a token of the beginning.
            bare = self._tokenizer.encode("a", add_special_tokens=False).ids
            whole = self._tokenizer.encode("a").ids
            opening = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
            self.prefix: list[int] = whole[:opening]
            # Text that spells a mark is no mark.
            self._tokenizer.encode_special_tokens = True
        except Exception as error:
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The teacher's tokenizer cannot be loaded ({error}). Start the teacher with a model whose tokenizer.json "
                "the tokenizers library reads.",
            ) from error

    def encode(self, text: str, *, opens: bool) -> _Encoded:
        """The ids of a piece of text without marks; `opens` says that no text stands before it."""
        if not opens and self.bytes.drops_first_space and text.startswith(" "):
            # Tokenizers of the SentencePiece kind put a space before whatever they are given: the one that is there already.
            found = self._by_bytes(self._run(text[1:]).ids, text)
            if found is not None:
                return found
        encoding = self._run(text)
        return self._by_bytes(encoding.ids, text) or _by_offsets(encoding, text)

    def _run(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises this class and no other
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The teacher's tokenizer cannot encode a text of {len(text)} characters ({error}). Start the teacher with a "
                "model whose tokenizer takes any text.",
            ) from error

    def _by_bytes(self, ids: list[int], text: str) -> _Encoded | None:
        """Where the tokens end, if they are `text` byte by byte, but for a space in front that is none of the text."""
        pieces = [self.bytes.of(each) for each in ids]
        known = [piece for piece in pieces if piece is not None]
        read, given = b"".join(known), text.encode()
        shift = 1 if self.bytes.drops_first_space and read == b" " + given else 0
        if len(known) < len(pieces) or read[shift:] != given:
            return None
        ends = np.maximum(np.cumsum([len(piece) for piece in known]) - shift, 0).tolist()
        return _Encoded(list(ids), ends, [True] * len(ends), exact=True)


def _by_offsets(encoding: Any, text: str) -> _Encoded:
    """By characters, as the library reports them: of tokens that share a character only the last is known to end."""
    widths = np.cumsum([0, *(len(character.encode()) for character in text)])
    begins = [begin for begin, _ in encoding.offsets]
    last = np.maximum.accumulate([end for _, end in encoding.offsets] or [0])
    following = [*begins[1:], len(text)]
    closes = [bool(after >= end) for end, after in zip(last, following, strict=False)]
    return _Encoded(list(encoding.ids), widths[last[: len(begins)]].tolist(), closes, exact=False)


def _same_marks(
    student: TokenBytes, teacher: _Encoder, student_roles: Mapping[str, Any], teacher_end_ids: Sequence[int]
) -> dict[int, int]:
    """The student's marks that the teacher has, as its own ids: by content, else by what they are for."""
    by_content = {content: number for number, content in teacher.bytes.marks.items()}
    by_role = {}
    if teacher_end_ids:
        by_role[str(student_roles.get("eos_token"))] = int(teacher_end_ids[0])
    if teacher.prefix:
        by_role[str(student_roles.get("bos_token"))] = teacher.prefix[0]
    found = {}
    for number, content in student.marks.items():
        own = by_content.get(content, by_role.get(content))
        if own is not None:
            found[number] = own
    return found
