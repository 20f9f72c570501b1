"""What each token id stands for, out of the tokenizer.json that a teacher sends; nothing in it is run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_LAST_PRINTED = 0x100
"""From here on the byte-level alphabet has the bytes that do not print."""


class TokenTexts:
    """The bytes of every token of one tokenizer."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Raises StillhouseError (TOKENIZER_INVALID) for what is no description of a tokenizer."""
        try:
            described = json.loads(tokenizer_json)
            vocab = described["model"]["vocab"]
            pairs = (
                vocab.items()
                if isinstance(vocab, Mapping)
                else ((entry[0], i) for i, entry in enumerate(vocab))
            )
            kinds = set(_kinds(described.get("decoder")) | _kinds(described.get("pre_tokenizer")))
            alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
            self._bytes = {int(number): _bytes_of(str(token), alphabet) for token, number in pairs}
            for token in described.get("added_tokens") or ():
                self._bytes[int(token["id"])] = str(token["content"]).encode("utf-8", "replace")
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"The teacher's tokenizer.json cannot be read ({type(error).__name__}), so tokens have no texts. Ask without "
                "logprobs.",
            ) from error

    def text(self, token: int) -> str:
        """The text of one token; a part of a character is shown as U+FFFD."""
        return self._bytes.get(token, b"").decode("utf-8", "replace")

    def as_json(self, token: int, logprob: float) -> dict[str, Any]:
        """The token as OpenAI's format has it."""
        return {"token": self.text(token), "logprob": logprob, "bytes": list(self._bytes.get(token, b""))}


def _kinds(part: Any) -> set[str]:
    """The types of a decoder or pre-tokeniser and of its parts."""
    if not isinstance(part, Mapping):
        return set()
    found = {str(part.get("type"))}
    for name in ("decoders", "pretokenizers"):
        for each in part.get(name) or ():
            found |= _kinds(each)
    return found


def _bytes_of(token: str, alphabet: Mapping[str, int] | None) -> bytes:
    if alphabet is not None:
        if all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        return token.encode("utf-8", "replace")
    if match := _BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE, " ").encode("utf-8", "replace")


def _byte_alphabet() -> dict[str, int]:
    """Character to byte in byte-level vocabularies: printing Latin-1 stands for itself, the rest follows from U+0100 on.

    It is the table of GPT-2 (Radford et al., 2019), which byte-level tokenizers share.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printing]
    table = {chr(byte): byte for byte in printing}
    return table | {chr(_LAST_PRINTED + index): byte for index, byte in enumerate(others)}
