"""Text of token ids, for people: bytes of each token, and the text of a sequence token by token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson

MAX_CHARACTERS = 80
"""Longest text of a single token that is shown."""


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """Returns the bytes of each id of a fast tokenizer: those of the vocabulary, or the content of an added token."""
    described = TokenizerJson(tokenizer.backend_tokenizer.to_str())
    return described.vocab_bytes() | {
        each.id: each.content.encode("utf-8", "replace") for each in described.added
    }


def token_text(content: bytes | None, token_id: int) -> str:
    """Returns the text of one token; bytes that are no whole character are written as \\xNN, and an unknown id as its number."""
    if content is None:
        return f"<{token_id}>"
    return content.decode("utf-8", "backslashreplace")[:MAX_CHARACTERS]


def running_texts(contents: Sequence[bytes | None], token_ids: Sequence[int]) -> list[str]:
    """Returns the text that each token adds to a sequence: a character whose bytes lie in several belongs to the last of these."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for content, token_id in zip(contents, token_ids, strict=True):
        text = token_text(None, token_id) if content is None else decoder.decode(content)
        texts.append(text[:MAX_CHARACTERS])
    return texts
