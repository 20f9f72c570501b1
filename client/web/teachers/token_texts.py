"""Texts of the teachers' token ids, and the form of their calls of tools, from the tokenizers that they send."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass

from stillhouse.client.teacher.tool_calls import TEMPLATE_FILES, Format, format_of
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
            "The teacher's tokenizer cannot be read",
            "Leave logprobs, echo and tools out, or serve another model.",
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


@dataclass(frozen=True, slots=True)
class ServedTokenizer:
    """Texts and tool format of a teacher's tokenizer."""

    texts: TokenTexts
    tool_format: Format | None
    """The form of calls of tools; None where its chat template asks for none that is known."""

    @classmethod
    def read(cls, files: Mapping[str, bytes]) -> ServedTokenizer:
        """Raises StillhouseError(TOKENIZER_INVALID)."""
        return cls(TokenTexts(files.get(_FILE, b"")), format_of(files))


class Tokenizers:
    """Tokenizers by fingerprint; each is fetched once."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], ServedTokenizer] = OrderedDict()
        self._fetching = asyncio.Lock()

    async def of(
        self, caller: Caller, service: Service, info: teacher_pb2.GetTeacherInfoResponse
    ) -> ServedTokenizer:
        """The tokenizer of the teacher, which told `caller` its `info`. Raises StillhouseError."""
        key = info.tokenizer_fingerprint, info.chat_template_fingerprint
        async with self._fetching:
            if key not in self._known:
                files = await _fetch(caller, service)
                self._known[key] = await asyncio.to_thread(ServedTokenizer.read, files)
            self._known.move_to_end(key)
            while len(self._known) > MAX_TOKENIZERS:
                self._known.popitem(last=False)
            return self._known[key]


async def _fetch(caller: Caller, service: Service) -> dict[str, bytes]:
    """The files that are read here."""
    files: dict[str, bytearray] = {}
    name, size = "", 0
    request = teacher_pb2.GetTokenizerRequest()
    async with aclosing(caller.stream(service, "GetTokenizer", request)) as chunks:
        async for chunk in chunks:
            name = chunk.file_name or name
            if name not in (_FILE, *TEMPLATE_FILES):
                continue
            files.setdefault(name, bytearray()).extend(chunk.data)
            size += len(chunk.data)
            if size > MAX_TOKENIZER_BYTES:
                raise StillhouseError(
                    Reason.TOKENIZER_INVALID,
                    f"The teacher's tokenizer is larger than {MAX_TOKENIZER_BYTES} bytes. Leave logprobs, echo and tools out.",
                )
    return {each: bytes(content) for each, content in files.items()}
