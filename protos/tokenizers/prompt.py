"""The tokens with which a text opens, the same for a prompt that is asked and for one that is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

UNPLACED = (0, 0)
"""Offsets of a token that the tokenizer adds."""


class Prompt(NamedTuple):
    """Tokens of a text that can be continued."""

    token_ids: list[int]
    offsets: list[tuple[int, int]]
    """Characters [begin, end) of each token."""
    is_doubled: bool
    """The text spelled out the beginning-of-text token that is added to it; one of the two was dropped."""


class Kept(NamedTuple):
    """The tokens of an encoded text that open it, [begin, end)."""

    begin: int
    """1 if the text spelled out the beginning-of-text token that is added to it, else 0."""
    end: int


def encode_prompt(tokenizer: Any, text: str) -> Prompt:
    """Encodes `text` with the tokens that a fast tokenizer of transformers puts before it, without one that ends it."""
    found = tokenizer(text, return_offsets_mapping=True)
    ids = [int(each) for each in found["input_ids"]]
    offsets = [(int(begin), int(end)) for begin, end in found["offset_mapping"]]
    begin, end = kept_tokens(ids, offsets.__getitem__, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
    return Prompt(ids[begin:end], offsets[begin:end], begin > 0)


def kept_tokens(
    ids: Sequence[int], offsets_at: Callable[[int], tuple[int, int]], *, bos: int | None, eos: int | None
) -> Kept:
    """Returns the tokens to keep of a text encoded with what its tokenizer adds; `offsets_at` are those of one token."""
    begin, end = 0, len(ids)
    # Some tokenizers end every text; an ended prompt cannot be continued.
    if end and ids[-1] == eos and offsets_at(end - 1) == UNPLACED and (end > 1 or bos != eos):
        end -= 1
    if bos is not None and end > 1 and ids[0] == bos == ids[1]:
        begin = int(offsets_at(0) == UNPLACED != offsets_at(1))
    return Kept(begin, end)


def require_vocabulary(tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer of special tokens alone, which transformers makes up where the files hold none."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        raise ValueError("its files hold no vocabulary")
