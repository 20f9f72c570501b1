"""The tokens with which a text opens, the same for a prompt that is asked and for one that is trained on."""

from __future__ import annotations

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


def encode_prompt(tokenizer: Any, text: str) -> Prompt:
    """Encodes `text` with the tokens that a fast tokenizer of transformers puts before it, without one that ends it."""
    found = tokenizer(text, return_offsets_mapping=True)
    ids = [int(each) for each in found["input_ids"]]
    offsets = [(int(begin), int(end)) for begin, end in found["offset_mapping"]]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # Some tokenizers end every text; an ended prompt cannot be continued.
    if ids and ids[-1] == eos and offsets[-1] == UNPLACED and (len(ids) > 1 or bos != eos):
        ids, offsets = ids[:-1], offsets[:-1]
    is_doubled = bos is not None and ids[:2] == [bos, bos] and offsets[0] == UNPLACED != offsets[1]
    return Prompt(ids[is_doubled:], offsets[is_doubled:], is_doubled)


def require_vocabulary(tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer of special tokens alone, which transformers makes up where the files hold none."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        raise ValueError("its files hold no vocabulary")
