"""Parses a tokenizer.json of the tokenizers library: ids, tokens, merges, and the bytes of each token. Runs nothing of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Stands for a space in SentencePiece tokens."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_FIRST_HIDDEN = 0x100
"""Code point of the first byte that does not print, in the byte-level alphabet."""
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


def byte_alphabet() -> dict[str, int]:
    """Character to byte in byte-level vocabularies, by GPT-2's table (Radford et al., 2019).

    Printing Latin-1 stands for itself; the other bytes follow from U+0100 on.
    """
    printing = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in printing]
    table = {chr(byte): byte for byte in printing}
    return table | {chr(_FIRST_HIDDEN + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF = byte_alphabet()


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedToken:
    """A token outside of the model's vocabulary, or one of it that is matched before the text is cut."""

    id: int
    content: str
    flags: tuple[bool, ...]
    """special, single_word, lstrip, rstrip, normalized."""

    @property
    def special(self) -> bool:
        """True if it stands for no text."""
        return self.flags[0]


class TokenizerJson:
    """The parsed file. Malformed ones raise various errors: parse and use it within `tokenizer_errors`."""

    def __init__(self, data: str | bytes) -> None:
        self.document: Mapping[str, Any] = json.loads(data)
        self.model: Mapping[str, Any] = self.document["model"]
        vocab = self.model["vocab"]
        self.is_unigram = not isinstance(vocab, Mapping)
        """True if the vocabulary is a list of [token, score]."""
        self.vocab: list[tuple[int, str]] = (
            [(index, str(entry[0])) for index, entry in enumerate(vocab)]
            if self.is_unigram
            else [(int(index), str(token)) for token, index in vocab.items()]
        )
        """(id, token) of the model."""
        self.added = tuple(
            AddedToken(
                id=int(each["id"]),
                content=str(each["content"]),
                flags=tuple(bool(each.get(flag)) for flag in _FLAGS),
            )
            for each in self.document.get("added_tokens") or ()
        )

    @property
    def tokens(self) -> dict[int, str]:
        """Id to token, added tokens included."""
        return dict(self.vocab) | {each.id: each.content for each in self.added}

    @property
    def unknown_id(self) -> int | None:
        """Id of the unknown token; None if there is none."""
        if self.is_unigram:
            found = self.model.get("unk_id")
        else:
            found = self.model["vocab"].get(self.model.get("unk_token"))
        return None if found is None else int(found)

    @property
    def merges(self) -> list[list[str]]:
        """Pairs of tokens that are merged, in order; older files hold them as "left right"."""
        merges = self.model.get("merges") or ()
        return [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in merges]

    def parts(self) -> Iterator[Mapping[str, Any]]:
        """Decoders and pre-tokenizers, members of sequences included."""
        yield from _parts(self.document.get("decoder"))
        yield from _parts(self.document.get("pre_tokenizer"))

    @property
    def kinds(self) -> set[str]:
        """Types of the decoders and pre-tokenizers, such as "ByteLevel"."""
        return {str(part.get("type")) for part in self.parts()}

    def vocab_bytes(self) -> dict[int, bytes]:
        """Id of each token of the model to the bytes that it stands for; they may end inside a character."""
        to_bytes = _byte_level_bytes if "ByteLevel" in self.kinds else _sentencepiece_bytes
        return {index: to_bytes(token) for index, token in self.vocab}


@contextmanager
def tokenizer_errors(problem: str, remedy: str) -> Iterator[None]:
    """Turns errors from a malformed file into StillhouseError(TOKENIZER_INVALID): "`problem` (cause). `remedy`"."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise StillhouseError(
            Reason.TOKENIZER_INVALID, f"{problem} ({type(error).__name__}: {error}). {remedy}"
        ) from error


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    if component is None:
        return
    yield component
    for name in ("decoders", "pretokenizers"):
        for each in component.get(name) or ():
            yield from _parts(each)


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # the library's decoder takes a token with other characters as it is
        return token.encode("utf-8", "replace")


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode("utf-8", "replace")
