"""Encodes text as a model reads and continues it: its own part goes on from the tokens of the prompt, as when it is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from stillhouse.protos.tokenizers.prompt import encode_prompt

_ANCHORS = (".", "\n", "a", "0", "(", "\u00e9")
"""Texts to continue from: the first one whose tokens stay apart from the continuation's serves."""


class Encoded(NamedTuple):
    """Tokens of a text."""

    token_ids: list[int]
    offsets: list[tuple[int, int]]
    """Characters [begin, end) of each token; equal for a token that stands for none, or for white space left out."""

    def mask(self, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Returns True for the tokens of the characters [begin, stop) of `spans`.

        A tokenizer may leave white space out of the offsets of a token, even if there is nothing else.
        """
        starts, ends = np.array(self.offsets, np.int64).reshape(-1, 2).T
        inside = np.zeros(len(ends), np.bool_)
        for begin, stop in spans:
            inside |= (begin < ends) & np.where(starts < ends, starts < stop, ends <= stop)
        return [bool(each) for each in inside]

    def has_border(self, cut: int) -> bool:
        """Returns True if a token ends at `cut` and the next one begins there."""
        starts, ends = np.array(self.offsets, np.int64).reshape(-1, 2).T
        return bool((ends == cut).any()) and not ((starts < cut) & (ends > cut)).any()


class TextEncoder:
    """Encodes with one fast tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._is_doubled = False
        self.num_doubled_openings = 0
        """Texts so far that spelled out the beginning-of-text token that is added to each; one of the two was dropped."""
        # SentencePiece tokenizers, and some others, put a space before a text; a continuation has none.
        plain, anchor = self._run("a").token_ids, self._run(".").token_ids
        self._opens_with_space = self._run(".a").token_ids != anchor + plain

    def encode(self, text: str, *, special: bool, cuts: Sequence[int] = ()) -> Encoded:
        """Encodes `text`; with `special` as the tokenizer opens a text, yet without an end token that it adds.

        At `cuts`, ascending offsets, a model is prompted with the text before and writes the text after: there the tokens
        are those of the prompt alone, and their continuation.
        """
        self._is_doubled = False
        encoded = self._encode(text, cuts, self._open if special else self._run)
        bos = self._tokenizer.bos_token_id
        if not special and bos is not None and bos != self._tokenizer.eos_token_id:
            self._is_doubled = encoded.token_ids[:2] == [bos, bos]
            encoded = Encoded(encoded.token_ids[self._is_doubled :], encoded.offsets[self._is_doubled :])
        self.num_doubled_openings += self._is_doubled
        return encoded

    def _encode(self, text: str, cuts: Sequence[int], run: Callable[[str], Encoded]) -> Encoded:
        encoded = run(text)
        for number, cut in enumerate(cuts):
            if not 0 < cut < len(text) or encoded.has_border(cut):
                continue
            head = run(text[:cut])
            later = [each - cut for each in cuts[number + 1 :]]
            tail = self._encode(text[cut:], later, self._continue)
            shifted = [(begin + cut, end + cut) for begin, end in tail.offsets]
            return Encoded(head.token_ids + tail.token_ids, head.offsets + shifted)
        return encoded

    def _run(self, text: str) -> Encoded:
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return Encoded(list(found["input_ids"]), [tuple(each) for each in found["offset_mapping"]])

    def _open(self, text: str) -> Encoded:
        prompt = encode_prompt(self._tokenizer, text)
        self._is_doubled = prompt.is_doubled
        return Encoded(prompt.token_ids, prompt.offsets)

    def _continue(self, text: str) -> Encoded:
        """Encodes text that goes on from another."""
        for anchor in _ANCHORS if self._opens_with_space else ():
            before, both = self._run(anchor), self._run(anchor + text)
            count = len(before.token_ids)
            if both.token_ids[:count] == before.token_ids and both.has_border(len(anchor)):
                shifted = [(begin - len(anchor), end - len(anchor)) for begin, end in both.offsets[count:]]
                return Encoded(both.token_ids[count:], shifted)
        return self._run(text)
