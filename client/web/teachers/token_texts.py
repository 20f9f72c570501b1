"""Text and bytes of the teachers' token ids, from the tokenizers that they send."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import aclosing
from dataclasses import dataclass

from stillhouse.client.web.security.callers import Caller
from stillhouse.client.web.upstream import Service
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson, tokenizer_errors

MAX_TOKENIZERS = 8
MAX_TOKENIZER_BYTES = 256 * 2**20
_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Token:
    """One token as answers show it."""

    text: str
    """Its text; where it is no whole character, "bytes:" and its bytes; of a special token, its name."""
    data: bytes
    """Its bytes in the text; of a special token those of its name."""
    special: bool
    """True if it has no place in the text."""


class TokenTexts:
    """Tokens of one tokenizer by id."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Raises StillhouseError(TOKENIZER_INVALID)."""
        with tokenizer_errors(
            "The teacher's tokenizer cannot be read", "Leave logprobs and echo out, or serve another model."
        ):
            tokenizer = TokenizerJson(tokenizer_json)
            self._bytes = tokenizer.vocab_bytes()
            self._special: dict[int, str] = {}
            for each in tokenizer.added:
                if each.special:
                    self._special[each.id] = each.content
                else:
                    self._bytes[each.id] = each.content.encode("utf-8", "replace")

    def token(self, token_id: int) -> Token:
        """The token of an id; one that the tokenizer lacks is named by its number."""
        name = self._special.get(token_id)
        content = self._bytes.get(token_id)
        if name is None and content is None:
            name = f"token_id:{token_id}"
        if name is not None:
            return Token(name, name.encode("utf-8", "replace"), special=True)
        assert content is not None
        try:
            return Token(content.decode(), content, special=False)
        except UnicodeDecodeError:
            escaped = "".join(f"\\x{byte:02x}" for byte in content)
            return Token(f"bytes:{escaped}", content, special=False)

    def text(self, token_ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        tokens = (self.token(each) for each in token_ids)
        return b"".join(each.data for each in tokens if not each.special).decode("utf-8", "replace")


class Tokenizers:
    """Tokenizers by fingerprint; each is fetched once."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, TokenTexts] = OrderedDict()
        self._fetching = asyncio.Lock()

    async def of(self, caller: Caller, service: Service, fingerprint: str) -> TokenTexts:
        """The tokens of the teacher, which told `caller` the fingerprint. Raises StillhouseError."""
        async with self._fetching:
            if fingerprint not in self._known:
                content = await _fetch(caller, service)
                self._known[fingerprint] = await asyncio.to_thread(TokenTexts, content)
            self._known.move_to_end(fingerprint)
            while len(self._known) > MAX_TOKENIZERS:
                self._known.popitem(last=False)
            return self._known[fingerprint]


async def _fetch(caller: Caller, service: Service) -> bytes:
    content, name = bytearray(), ""
    request = teacher_pb2.GetTokenizerRequest()
    async with aclosing(caller.stream(service, "GetTokenizer", request)) as chunks:
        async for chunk in chunks:
            name = chunk.file_name or name
            if name == _FILE:
                content += chunk.data
            elif content:
                break
            if len(content) > MAX_TOKENIZER_BYTES:
                raise StillhouseError(
                    Reason.TOKENIZER_INVALID,
                    f"The teacher's {_FILE} is larger than {MAX_TOKENIZER_BYTES} bytes. Leave logprobs and echo out.",
                )
    return bytes(content)
