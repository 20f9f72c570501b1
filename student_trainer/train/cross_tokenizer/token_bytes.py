"""Which bytes of text each id of a tokenizer stands for, read from its tokenizer.json; and which ids are marks, which stand for none.

Known are byte-level tokenizers, whose tokens are pieces of UTF-8 that may end inside a character, and those of the
SentencePiece kind, where a sign in a token is a space and a byte may be a token of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson, tokenizer_errors


class TokenBytes:
    """The bytes of the ids of one tokenizer."""

    def __init__(self, tokenizer_json: str | bytes, whose: str) -> None:
        """`whose` tokenizer it is, for errors. Raises StillhouseError(TOKENIZER_INVALID) for one of another kind."""
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
                f"The {whose}'s tokenizer is neither byte-level nor of the SentencePiece kind, so its tokens cannot be "
                "matched with text byte by byte, which loss.foreign_tokenizer: alm needs. Use another model.",
            )
        self.size = 1 + max(ids, default=-1)
        """Ids are below it."""
        self.marks: Mapping[int, str] = {each.id: each.content for each in tokenizer.added if each.special}
        """Id to content of special tokens."""
        self.drops_first_space = not by_bytes and drops
        """Whether the space with which the first token begins is none of the text."""
        if unknown is not None:
            self._table.pop(unknown, None)
        self._table |= {each.id: each.content.encode() for each in tokenizer.added if not each.special}
        for number in self.marks:
            self._table.pop(number, None)

    def of(self, token_id: int) -> bytes | None:
        """The bytes of an id; None for a mark, for the unknown token and for an id that the tokenizer lacks."""
        return self._table.get(token_id)


def _drops_space(part: Mapping[str, Any]) -> bool:
    if part.get("type") == "Metaspace":
        return part.get("prepend_scheme", "always") != "never" and bool(part.get("add_prefix_space", True))
    return part.get("type") == "Strip" and part.get("content") == " " and bool(part.get("start"))
