"""Documents of OpenAI's API from pieces of samples: choices, log-probabilities and usage."""

from __future__ import annotations

import codecs
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stillhouse.client.teacher.generate import Piece
from stillhouse.client.teacher.tool_calls import Format, Parsed, TextSplitter, choice_fields
from stillhouse.client.web.openai.ask import Ask
from stillhouse.client.web.teachers.served import Served
from stillhouse.client.web.teachers.token_texts import Token, TokenTexts
from stillhouse.protos.tensors.distributions import Distributions

IMPOSSIBLE = -9999.0
"""Stands for the log-probability of what cannot be, as in OpenAI's API: JSON has no infinities."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Echo:
    """A prompt that its completion repeats."""

    text: str
    token_ids: Sequence[int]
    rows: Distributions | None
    """From its second token on, if log-probabilities are requested."""


@dataclass(kw_only=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompts: dict[int, int] = field(default_factory=dict)
    """Tokens by index of the prompt."""
    completion_tokens: int = 0

    def add(self, piece: Piece) -> None:
        """Counts the tokens of a piece."""
        self.prompts[piece.prompt_index] = max(self.prompts.get(piece.prompt_index, 0), piece.prompt_tokens)
        self.completion_tokens += len(piece.token_ids)

    def document(self) -> dict[str, int]:
        """The counts as the API has them."""
        read = sum(self.prompts.values())
        return {
            "prompt_tokens": read,
            "completion_tokens": self.completion_tokens,
            "total_tokens": read + self.completion_tokens,
        }


class _Offset:
    """Characters of a text whose bytes come token by token."""

    def __init__(self) -> None:
        self.characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> int:
        """Counts the bytes of a token; returns the place of its first character.

        Bytes that are no character count as their replacement, also those that a new character cuts short.
        """
        if data and data[0] & 0xC0 != 0x80:
            self.characters += len(self._decoder.decode(b"", final=True))
        begin = self.characters
        self.characters += len(self._decoder.decode(data))
        return begin


class Answer:
    """The documents of one request; pieces of a choice come in order."""

    def __init__(
        self, ask: Ask, model: Served, texts: TokenTexts | None, tool_format: Format | None = None
    ) -> None:
        """`texts` are needed for log-probabilities, `tool_format` for calls of tools."""
        self._ask, self._texts = ask, texts
        self._splitters: defaultdict[int, TextSplitter] = defaultdict(
            lambda: TextSplitter(tool_format if ask.has_tools else None)
        )
        self._head = {
            "id": f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": ask.model,
            "system_fingerprint": f"fp_{model.info.model_fingerprint[:16]}",
        }
        self._offsets: defaultdict[int, _Offset] = defaultdict(_Offset)
        self._begun: set[int] = set()

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The answer that is sent at once."""
        kind = "chat.completion" if self._ask.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": list(choices), "usage": usage.document()}

    def part(self, choices: Sequence[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self._ask.is_chat else "text_completion"
        document = {**self._head, "object": kind, "choices": list(choices)}
        if self._ask.include_usage:
            document["usage"] = None if usage is None else usage.document()
        return document

    def choice(self, piece: Piece, echo: Echo | None = None) -> dict[str, Any]:
        """A choice, or its next piece in a stream, with the prompt before it where `echo` is given."""
        index = piece.prompt_index * self._ask.n + piece.sample_index
        end: dict[str, Any] = {
            "finish_reason": piece.finish or None,
            "logprobs": self._logprobs(index, piece, echo),
        }
        if not self._ask.is_chat:
            return {"index": index, "text": (echo.text if echo else "") + piece.text, **end}
        fields, end["finish_reason"] = choice_fields(self._parsed(index, piece), piece.finish or None)
        if not self._ask.stream:
            return {"index": index, "message": {"role": "assistant", "refusal": None, **fields}, **end}
        role = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        if "tool_calls" in fields:
            fields["tool_calls"] = [{"index": at, **each} for at, each in enumerate(fields["tool_calls"])]
        return {"index": index, "delta": {**role, **fields}, **end}

    def _parsed(self, index: int, piece: Piece) -> Parsed:
        """Content of a piece, and with the last one the calls of tools in its choice."""
        splitter = self._splitters[index]
        content = splitter.add(piece.text)
        if not piece.finish:
            return Parsed(content)
        rest = splitter.end()
        return Parsed(content + rest.content, rest.calls)

    def _logprobs(self, index: int, piece: Piece, echo: Echo | None) -> dict[str, Any] | None:
        if self._ask.logprobs is None:
            return None
        assert self._texts is not None
        rows = _rows(self._texts, piece.token_ids.tolist(), piece.distributions)
        if self._ask.is_chat:
            return {"content": [_chat_row(*row) for row in rows], "refusal": None}
        if echo is not None:
            ids = list(echo.token_ids)
            first: list[_Row] = [(self._texts.token(each), None, []) for each in ids[:1]]
            rows = first + _rows(self._texts, ids[1:], echo.rows) + rows
        offsets = []
        offset = self._offsets[index]
        drops_space = echo is not None and not echo.text.startswith(" ")
        for token, _, _ in rows:
            if token.special:
                offsets.append(offset.characters)
                continue
            # SentencePiece begins a text with a space that is none of it.
            offsets.append(offset.add(token.data.removeprefix(b" ") if drops_space else token.data))
            drops_space = False
        return {
            "tokens": [token.text for token, _, _ in rows],
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [_completion_top(*row) for row in rows],
            "text_offset": offsets,
        }


_Row = tuple[Token, float | None, list[tuple[Token, float]]]
"""A token, its log-probability, and the likeliest tokens with theirs."""


def _rows(texts: TokenTexts, token_ids: Sequence[int], rows: Distributions | None) -> list[_Row]:
    if rows is None:
        return []
    own = _finite(rows.target_logprobs)
    top, tops = rows.token_ids.tolist(), _finite(rows.logprobs)
    result: list[_Row] = []
    for at, token_id in enumerate(token_ids):
        likeliest = dict(zip(top[at], tops[at], strict=True))
        # The same number in both places, to the bit: programs compare them to see if a token is the likeliest.
        logprob = likeliest.get(token_id, own[at])
        shown = [(texts.token(each), value) for each, value in likeliest.items()]
        result.append((texts.token(token_id), logprob, shown))
    return result


def _finite(values: Any) -> Any:
    return np.where(np.isneginf(values), IMPOSSIBLE, values).tolist()


def _completion_top(
    token: Token, logprob: float | None, top: list[tuple[Token, float]]
) -> dict[str, float] | None:
    """The likeliest tokens by text, and the token itself. Of tokens with the same text the likelier counts."""
    if logprob is None:
        return None
    found: dict[str, float] = {}
    for each, value in top:
        found.setdefault(each.text, value)
    found.setdefault(token.text, logprob)
    return found


def _chat_row(token: Token, logprob: float | None, top: list[tuple[Token, float]]) -> dict[str, Any]:
    likeliest = [_chat_token(each, value) for each, value in top]
    return {**_chat_token(token, logprob), "top_logprobs": likeliest}


def _chat_token(token: Token, logprob: float | None) -> dict[str, Any]:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.data)}
