"""Maps the token ids of a tokenizer.json to the bytes of text that they stand for; special tokens stand for none.

Supports byte-level tokenizers, whose tokens are UTF-8 fragments that may end inside a character, and SentencePiece
tokenizers, where a sign stands for a space and a byte may be a token of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson, tokenizer_errors


class TokenBytes:
    """Bytes of the token ids of one tokenizer."""

    def __init__(self, tokenizer_json: str | bytes, whose: str) -> None:
        """Reads the tokenizer of side `whose`, named in errors. Raises StillhouseError(TOKENIZER_INVALID) for an unsupported one."""
        with tokenizer_errors(
            f"The {whose}'s tokenizer cannot be read",
            "Use a model that has a tokenizer.json of the tokenizers library.",
        ):
            tokenizer = TokenizerJson(tokenizer_json)
            kinds, unknown = tokenizer.kinds, tokenizer.unknown_id
            self._table = tokenizer.vocab_bytes()
            ids = tokenizer.tokens
            drops = any(_drops_space(part) for part in tokenizer.parts())
        by_bytes = "ByteLevel" in kinds
        if not by_bytes and not kinds & {"Metaspace", "ByteFallback"}:
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The {whose}'s tokenizer is neither byte-level nor SentencePiece, so its tokens cannot be matched with text "
                "byte by byte, which loss.foreign_tokenizer: alm needs. Use another model.",
            )
        self.size = 1 + max(ids, default=-1)
        """Exclusive upper bound of the ids."""
        self.special_tokens: Mapping[int, str] = {
            each.id: each.content for each in tokenizer.added if each.special
        }
        """Id to content of special tokens."""
        self.drops_first_space = not by_bytes and drops
        """True if the leading space of the first token is not part of the text."""
        if unknown is not None:
            self._table.pop(unknown, None)
        self._table |= {each.id: each.content.encode() for each in tokenizer.added if not each.special}
        for number in self.special_tokens:
            self._table.pop(number, None)

    def lookup(self, token_id: int) -> bytes | None:
        """Returns the bytes of an id; None for special tokens, the unknown token and ids that the tokenizer lacks."""
        return self._table.get(token_id)


def _drops_space(part: Mapping[str, Any]) -> bool:
    if part.get("type") == "Metaspace":
        return part.get("prepend_scheme", "always") != "never" and bool(part.get("add_prefix_space", True))
    return part.get("type") == "Strip" and part.get("content") == " " and bool(part.get("start"))
