"""Which bytes of text each id of a tokenizer stands for, read from its tokenizer.json; and which ids are marks, which stand for none.

Known are byte-level tokenizers, whose tokens are pieces of UTF-8 that may end inside a character, and those of the
SentencePiece kind, where a sign in a token is a space and a byte may be a token of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Stands for a space in tokens of the SentencePiece kind."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of the ids of one tokenizer."""

    def __init__(self, tokenizer_json: str | bytes, whose: str) -> None:
        """`whose` tokenizer it is, for errors. Raises StillhouseError(TOKENIZER_INVALID) for one of another kind."""
        try:
            document = json.loads(tokenizer_json)
            tokens, unknown = _tokens(document["model"])
            added = [
                (int(each["id"]), str(each["content"]), bool(each.get("special")))
                for each in document.get("added_tokens") or ()
            ]
            parts = [*_parts(document.get("decoder")), *_parts(document.get("pre_tokenizer"))]
            kinds = {part.get("type") for part in parts}
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The {whose}'s tokenizer cannot be read ({type(error).__name__}: {error}). Use a model that has a "
                "tokenizer.json of the tokenizers library.",
            ) from error
        by_bytes = "ByteLevel" in kinds
        if not by_bytes and not kinds & {"Metaspace", "ByteFallback"}:
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The {whose}'s tokenizer is neither byte-level nor of the SentencePiece kind, so its tokens cannot be "
                "matched with text byte by byte, which loss.foreign_tokenizer: alm needs. Use another model.",
            )
        self.size = 1 + max((*tokens, *(number for number, _, _ in added)), default=-1)
        """Ids are below it."""
        self.marks: Mapping[int, str] = {number: content for number, content, special in added if special}
        """Id to content of special tokens."""
        self.drops_first_space = not by_bytes and any(_drops_space(part) for part in parts)
        """Whether the space with which the first token begins is none of the text."""
        piece = _byte_level_piece if by_bytes else _sentence_piece
        self._table = {number: piece(token) for number, token in tokens.items() if number != unknown}
        self._table |= {number: content.encode() for number, content, special in added if not special}
        for number in self.marks:
            self._table.pop(number, None)

    def of(self, token_id: int) -> bytes | None:
        """The bytes of an id; None for a mark, for the unknown token and for an id that the tokenizer lacks."""
        return self._table.get(token_id)


def _tokens(model: Mapping[str, Any]) -> tuple[dict[int, str], int | None]:
    """Id to token, and the id of the unknown token if there is one."""
    vocab = model["vocab"]
    if isinstance(vocab, Mapping):
        tokens = {int(number): str(token) for token, number in vocab.items()}
        unknown = vocab.get(model.get("unk_token"))
    else:  # Unigram: a list of [token, score], by id
        tokens = {number: str(entry[0]) for number, entry in enumerate(vocab)}
        unknown = model.get("unk_id")
    return tokens, None if unknown is None else int(unknown)


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    """A decoder or pre-tokenizer, or the members of a sequence of such, at any depth."""
    if component is None:
        return
    yield component
    for name in ("decoders", "pretokenizers"):
        for each in component.get(name) or ():
            yield from _parts(each)


def _drops_space(part: Mapping[str, Any]) -> bool:
    if part.get("type") == "Metaspace":
        return part.get("prepend_scheme", "always") != "never" and bool(part.get("add_prefix_space", True))
    return part.get("type") == "Strip" and part.get("content") == " " and bool(part.get("start"))


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in tokens of byte-level tokenizers: itself if it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF = _alphabet()


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # the library's decoder takes a token with other characters as it is
        return token.encode("utf-8", "replace")


def _sentence_piece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode("utf-8", "replace")
