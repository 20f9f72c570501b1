"""Translates a student's text into the tokens of a teacher with another tokenizer, aligned by bytes.

The student's token ids define the text, so that both sides see the same bytes even if it was truncated or generated.
Special tokens are not text: one that the teacher has too becomes the teacher's, beginning and end of text become the
teacher's own, and any other is dropped and counted. Text that spells a special token stays text.
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
from stillhouse.student_trainer.train.data.alignment import AlignedText, Tokens, align
from stillhouse.student_trainer.train.data.encoding import Example

_VALID = re.compile("[^\udc80-\udcff]+")
"""Text between bytes that are not UTF-8, which surrogateescape turns into these characters."""
_WHITE_SPACE = np.isin(np.arange(256), np.frombuffer(b" \t\n\r", np.uint8))


@dataclass(kw_only=True, slots=True)
class AlignmentStats:
    """Counts of aligned and dropped tokens."""

    num_targets: int = 0
    num_aligned: int = 0
    """Targets in a chunk."""
    num_chunks: int = 0
    num_inexact: int = 0
    """Texts that the teacher's tokenizer normalises, so that token ends come from its character offsets."""
    dropped_special_tokens: Counter[str] = field(default_factory=Counter)
    """Special tokens of the student without a counterpart in the teacher."""


class Bridge:
    """Translates from the tokens of one student to those of one teacher."""

    def __init__(
        self,
        student_json: str | bytes,
        teacher_json: str | bytes,
        *,
        student_roles: Mapping[str, Any],
        teacher_end_ids: Sequence[int],
        student_end_ids: Sequence[int] = (),
        words: bool = False,
    ) -> None:
        """Loads both tokenizers. `student_roles` maps roles such as "eos_token" to tokens; `teacher_end_ids` end a text of the teacher, and
        `student_end_ids` one of the student.

        With `words` chunks end only before white space. Raises StillhouseError(TOKENIZER_INVALID).
        """
        self._student = TokenBytes(student_json, "student")
        self._teacher = _TeacherEncoder(teacher_json)
        self.teacher_size = self._teacher.bytes.size
        """Number of the teacher's token ids."""
        self._words = words
        self._special_tokens = _shared_special_tokens(
            self._student, self._teacher, student_roles, teacher_end_ids, student_end_ids
        )
        self.stats = AlignmentStats()

    def translate(self, example: Example) -> AlignedText | None:
        """Translates and aligns the example's text; returns None if it has no complete chunk."""
        text = _StudentText.from_example(example, self._student)
        ids, ends, closes = (
            [*self._teacher.prefix],
            [0] * len(self._teacher.prefix),
            [True] * len(self._teacher.prefix),
        )
        missing = np.ones(len(text.content), np.bool_)
        exact, has_text = True, False
        for segment in text.segments:
            if segment.token_id is None:
                encoded = self._teacher.encode(segment.text, opens=not has_text)
                has_text = True
                exact &= encoded.exact
                ids += encoded.token_ids
                ends += [segment.begin + end for end in encoded.ends]
                closes += encoded.closes
            else:
                own = self._special_tokens.get(segment.token_id)
                if own is None:
                    name = self._student.special_tokens.get(segment.token_id, f"id {segment.token_id}")
                    self.stats.dropped_special_tokens[name] += 1
                    continue
                if ids == self._teacher.prefix == [own]:
                    ends = [segment.end]  # the teacher's own beginning of text
                else:
                    ids.append(own)
                    ends.append(segment.end)
                    closes.append(True)
            missing[segment.begin : segment.end] = False
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
        stats = self.stats
        stats.num_targets += example.num_targets
        stats.num_aligned += int((chunks.student >= 0).sum())
        stats.num_chunks += chunks.number
        stats.num_inexact += not exact
        return AlignedText(token_ids=np.array(ids, np.int32), chunks=chunks) if chunks.number else None


class _TextSegment(NamedTuple):
    """A span of UTF-8 text or a special token; [begin, end) in the content."""

    begin: int
    end: int
    text: str = ""
    token_id: int | None = None
    """Id of the special token; None for text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _StudentText:
    """The text of a student's tokens."""

    content: bytes
    """Bytes, with one for each special token."""
    ends: NDArray[np.int64]
    """End offset of each of the student's tokens."""
    segments: Sequence[_TextSegment]
    """In order; bytes that are not UTF-8 are in none."""
    cuts: NDArray[np.int64]
    """Offsets where segments begin and end, in any order."""

    @classmethod
    def from_example(cls, example: Example, student: TokenBytes) -> _StudentText:
        token_bytes = [student.lookup(int(each)) for each in example.token_ids]
        if student.drops_first_space:
            first = next((index for index, each in enumerate(token_bytes) if each is not None), None)
            if first is not None:
                token_bytes[first] = token_bytes[first].removeprefix(b" ")  # type: ignore[union-attr]
        ends = np.cumsum([1 if each is None else len(each) for each in token_bytes])
        content = b"".join(b"\0" if each is None else each for each in token_bytes)
        segments = list(_segments(example, token_bytes, ends, content))
        return cls(
            content=content,
            ends=ends,
            segments=segments,
            cuts=np.array([offset for each in segments for offset in (each.begin, each.end)], np.int64),
        )

    @property
    def word_ends(self) -> NDArray[np.bool_]:
        """True at offsets before white space, and at the end, [bytes + 1]."""
        return np.append(_WHITE_SPACE[np.frombuffer(self.content, np.uint8)], True)


def _segments(
    example: Example, token_bytes: Sequence[bytes | None], ends: NDArray[np.int64], content: bytes
) -> Iterator[_TextSegment]:
    """Yields special tokens and the text between them, also cut where a completion begins or ends, like the student's tokens."""
    borders = np.flatnonzero(example.mask[1:] != example.mask[:-1]) + 1
    special = {index for index, each in enumerate(token_bytes) if each is None}
    begin = 0
    for index in sorted({*borders.tolist(), example.num_prompt or 0, *special}):
        until = int(ends[index - 1]) if index else 0
        if index in special:
            yield from _valid_utf8(content, begin, until)
            yield _TextSegment(until, until + 1, token_id=int(example.token_ids[index]))
            begin = until + 1
        elif until < len(content) and _starts_character(content, until):
            yield from _valid_utf8(content, begin, until)
            begin = until
    yield from _valid_utf8(content, begin, len(content))


def _starts_character(content: bytes, offset: int) -> bool:
    """Returns False inside a UTF-8 character."""
    return content[offset] & 0xC0 != 0x80


def _valid_utf8(content: bytes, begin: int, end: int) -> Iterator[_TextSegment]:
    """Yields the spans of [begin, end) that are UTF-8."""
    decoded = content[begin:end].decode("utf-8", "surrogateescape")
    offset, seen = begin, 0
    for match in _VALID.finditer(decoded):
        offset += match.start() - seen  # each skipped character stands for one byte
        text, seen = match.group(), match.end()
        length = len(text.encode())
        yield _TextSegment(offset, offset + length, text=text)
        offset += length


class _Encoded(NamedTuple):
    token_ids: list[int]
    ends: list[int]
    """Offsets in bytes of the given text."""
    closes: list[bool]
    exact: bool


class _TeacherEncoder:
    """The teacher's tokenizer: encodes text and locates token ends."""

    def __init__(self, tokenizer_json: str | bytes) -> None:
        from tokenizers import Tokenizer

        self.bytes = TokenBytes(tokenizer_json, "teacher")
        content = tokenizer_json.decode() if isinstance(tokenizer_json, bytes) else tokenizer_json
        try:
            self._tokenizer = Tokenizer.from_str(content)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            # Tokens that open every text, such as a beginning-of-text token.
            bare = self._tokenizer.encode("a", add_special_tokens=False).ids
            whole = self._tokenizer.encode("a").ids
            opening = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
            self.prefix: list[int] = whole[:opening]
            # Text that spells a special token is encoded as text.
            self._tokenizer.encode_special_tokens = True
        except Exception as error:
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The teacher's tokenizer cannot be loaded ({error}). Start the teacher with a model whose tokenizer.json "
                "the tokenizers library reads.",
            ) from error

    def encode(self, text: str, *, opens: bool) -> _Encoded:
        """Encodes text without special tokens; `opens` is True at the beginning of the document."""
        if not opens and self.bytes.drops_first_space and text.startswith(" "):
            # SentencePiece tokenizers prepend a space to their input: the space that is there already.
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
        """Locates token ends if the tokens spell `text` byte by byte, except for a prepended space; else returns None."""
        token_bytes = [self.bytes.lookup(each) for each in ids]
        known = [each for each in token_bytes if each is not None]
        spelled, given = b"".join(known), text.encode()
        shift = 1 if self.bytes.drops_first_space and spelled == b" " + given else 0
        if len(known) < len(token_bytes) or spelled[shift:] != given:
            return None
        ends = np.maximum(np.cumsum([len(each) for each in known]) - shift, 0).tolist()
        return _Encoded(list(ids), ends, [True] * len(ends), exact=True)


def _by_offsets(encoding: Any, text: str) -> _Encoded:
    """Locates token ends by the library's character offsets: of tokens that share a character only the last has an exact end."""
    widths = np.cumsum([0, *(len(character.encode()) for character in text)])
    begins = [begin for begin, _ in encoding.offsets]
    last = np.maximum.accumulate([end for _, end in encoding.offsets] or [0])
    following = [*begins[1:], len(text)]
    closes = [bool(after >= end) for end, after in zip(last, following, strict=False)]
    return _Encoded(list(encoding.ids), widths[last[: len(begins)]].tolist(), closes, exact=False)


def _shared_special_tokens(
    student: TokenBytes,
    teacher: _TeacherEncoder,
    student_roles: Mapping[str, Any],
    teacher_end_ids: Sequence[int],
    student_end_ids: Sequence[int],
) -> dict[int, int]:
    """Maps the student's special tokens to the teacher's ids: by content, else by role, which an end of turns has too."""
    by_content = {content: number for number, content in teacher.bytes.special_tokens.items()}
    by_role = {}
    if teacher_end_ids:
        ends = (student.special_tokens.get(each) for each in student_end_ids)
        for content in (student_roles.get("eos_token"), *ends):
            by_role[str(content)] = int(teacher_end_ids[0])
    if teacher.prefix:
        by_role[str(student_roles.get("bos_token"))] = teacher.prefix[0]
    found = {}
    for number, content in student.special_tokens.items():
        own = by_content.get(content, by_role.get(content))
        if own is not None:
            found[number] = own
    return found
