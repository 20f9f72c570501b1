"""Encodes text as a model reads and continues it: its own part goes on from the tokens of the prompt, as when it is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tokenizers.prompt import kept_tokens

_ANCHORS = (".", "\n", "a", "0", "(", "\u00e9")
"""Texts to continue from: the first one whose tokens stay apart from the continuation's serves."""


class TextRequest(NamedTuple):
    """A text to encode."""

    text: str
    special: bool
    """Opened as the tokenizer opens a text, yet without an end token that it adds."""
    cuts: Sequence[int] = ()
    """Ascending offsets where a model is prompted with the text before and writes the text after: there the tokens are
    those of the prompt alone, and their continuation."""


class Encoded:
    """Tokens of a text."""

    __slots__ = ("_offsets", "token_ids")

    def __init__(
        self, token_ids: list[int], offsets: NDArray[np.int64] | Callable[[], Sequence[tuple[int, int]]]
    ) -> None:
        """`offsets` may be a function: many texts need none."""
        self.token_ids = token_ids
        self._offsets = offsets

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Characters [begin, end) of each token, [n, 2]; equal for a token that stands for none, or for white space left out."""
        if callable(self._offsets):
            flat = chain.from_iterable(self._offsets())
            self._offsets = np.fromiter(flat, np.int64, 2 * len(self.token_ids)).reshape(-1, 2)
        return self._offsets

    def mask(self, spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
        """Returns True for the tokens of the characters [begin, stop) of `spans`.

        A tokenizer may leave white space out of the offsets of a token, even if there is nothing else.
        """
        starts, ends = self.offsets.T
        inside = np.zeros(len(ends), np.bool_)
        for begin, stop in spans:
            inside |= (begin < ends) & np.where(starts < ends, starts < stop, ends <= stop)
        return inside

    def has_border(self, cut: int) -> bool:
        """Returns True if a token ends at `cut` and the next one begins there."""
        starts, ends = self.offsets.T
        return bool((ends == cut).any()) and not ((starts < cut) & (ends > cut)).any()

    def part(self, begin: int, end: int | None = None) -> Encoded:
        """Returns the tokens [begin, end)."""
        if begin == 0 and end in (None, len(self.token_ids)):
            return self
        return Encoded(self.token_ids[begin:end], self.offsets[begin:end])

    def shifted(self, by: int) -> Encoded:
        """Returns the same tokens `by` characters later."""
        return Encoded(self.token_ids, self.offsets + by)

    def followed_by(self, later: Encoded) -> Encoded:
        """Returns the tokens of both."""
        return Encoded(self.token_ids + later.token_ids, np.concatenate([self.offsets, later.offsets]))


class TextEncoder:
    """Encodes with one fast tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._is_doubled = False
        self.num_doubled_openings = 0
        """Texts so far that spelled out the beginning-of-text token that is added to each; one of the two was dropped."""
        # SentencePiece tokenizers, and some others, put a space before a text; a continuation has none.
        plain, anchor = self._run("a").token_ids, self._run(".").token_ids
        self._opens_with_space = self._run(".a").token_ids != anchor + plain

    def encode(self, text: str, *, special: bool, cuts: Sequence[int] = ()) -> Encoded:
        """Encodes one text, as the fields of a TextRequest say."""
        return self.encode_all([TextRequest(text, special, cuts)])[0]

    def encode_all(self, requests: Sequence[TextRequest]) -> list[Encoded]:
        """Encodes several texts, each as it would be alone: whole in one call, then what their cuts need."""
        special = [each.special for each in requests]
        whole: dict[bool, list[Encoded]] = {
            kind: self._tokens([each.text for each in requests if each.special is kind], special=kind)
            for kind in (False, True)
        }
        first = {kind: iter(found) for kind, found in whole.items()}
        return [
            self._finish(request, next(first[kind])) for request, kind in zip(requests, special, strict=True)
        ]

    def _finish(self, request: TextRequest, whole: Encoded) -> Encoded:
        self._is_doubled = False
        if request.special:
            encoded = self._encode(request.text, request.cuts, self._open, self._opened(whole))
        else:
            encoded = self._encode(request.text, request.cuts, self._run, whole)
            if self._bos is not None and self._bos != self._eos:
                self._is_doubled = encoded.token_ids[:2] == [self._bos, self._bos]
                encoded = encoded.part(int(self._is_doubled))
        self.num_doubled_openings += self._is_doubled
        return encoded

    def _encode(
        self, text: str, cuts: Sequence[int], run: Callable[[str], Encoded], whole: Encoded
    ) -> Encoded:
        """Returns the tokens of `text`, which are `whole` without cuts."""
        for number, cut in enumerate(cuts):
            if not 0 < cut < len(text) or whole.has_border(cut):
                continue
            head = run(text[:cut])
            later = [each - cut for each in cuts[number + 1 :]]
            tail = self._encode(text[cut:], later, self._continue, self._continue(text[cut:]))
            return head.followed_by(tail.shifted(cut))
        return whole

    def _tokens(self, texts: list[str], *, special: bool) -> list[Encoded]:
        if not texts:
            return []
        found = self._tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            Encoded(ids, partial(getattr, encoding, "offsets"))
            for ids, encoding in zip(found["input_ids"], found.encodings, strict=True)
        ]

    def _run(self, text: str) -> Encoded:
        return self._tokens([text], special=False)[0]

    def _open(self, text: str) -> Encoded:
        return self._opened(self._tokens([text], special=True)[0])

    def _opened(self, found: Encoded) -> Encoded:
        begin, end = kept_tokens(
            found.token_ids,
            lambda at: (int(found.offsets[at, 0]), int(found.offsets[at, 1])),
            bos=self._bos,
            eos=self._eos,
        )
        self._is_doubled = begin > 0
        return found.part(begin, end)

    def _continue(self, text: str) -> Encoded:
        """Encodes text that goes on from another."""
        for anchor in _ANCHORS if self._opens_with_space else ():
            before, both = self._run(anchor), self._run(anchor + text)
            count = len(before.token_ids)
            if both.token_ids[:count] == before.token_ids and both.has_border(len(anchor)):
                return both.part(count).shifted(-len(anchor))
        return self._run(text)
