"""A server that only chats: messages in, text out, with the few candidates of each token that its API allows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.conversation import OPTIONS, Turns
from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson, tokenizer_errors
from stillhouse.teacher_service.engine import Finish, GenerateInput, Int32Array
from stillhouse.teacher_service.engines.openai.dialect import (
    MESSAGE_BYTES,
    Piece,
    ServedModel,
    require_known,
)
from stillhouse.teacher_service.engines.openai.http_client import Request
from stillhouse.teacher_service.engines.openai.rows import fields, from_mappings, invalid, items, number
from stillhouse.teacher_service.models.tokenizer import TextCodec

CHAT = "/v1/chat/completions"
CANDIDATE_BYTES = 512
"""Bytes of one candidate in JSON, with its text and the list of its bytes."""
MAX_TOKEN_TEXT_BYTES = 4096
_UNKNOWN_LOGPROB = -9999.0
"""Stands for a sampled token outside of the candidates that OpenAI's API reports."""
_FINISHES: dict[Any, Finish] = {"stop": "stop", "length": "length"}


class TokensByBytes:
    """Ids of a tokenizer by the bytes of their text, as chat APIs name tokens."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Raises errors of malformed files: use it within `tokenizer_errors`."""
        tokenizer = TokenizerJson(tokenizer_json)
        table = tokenizer.vocab_bytes() | {each.id: each.content.encode() for each in tokenizer.added}
        self._ids: dict[bytes, int] = {}
        self._ambiguous: set[bytes] = set()
        for token, text in table.items():
            if self._ids.setdefault(text, token) != token:
                self._ambiguous.add(text)

    def lookup(self, entry: Mapping[str, Any]) -> int:
        """The id of an entry `{"token": text, "bytes": [...]}`. Raises `StillhouseError` (TENSOR_INVALID) without one."""
        listed, text = entry.get("bytes"), entry.get("token")
        if isinstance(listed, list) and len(listed) <= MAX_TOKEN_TEXT_BYTES:
            if not all(isinstance(each, int) and 0 <= each < 256 for each in listed):
                invalid("names a token by something that is not bytes")
            name = bytes(listed)
        elif isinstance(text, str) and len(text) <= MAX_TOKEN_TEXT_BYTES:
            name = text.encode("utf-8", "replace")
        else:
            invalid("names a token by neither bytes nor text")
        if name not in self._ids or name in self._ambiguous:
            invalid(
                f"names the token {name[:40]!r}, which --tokenizer "
                f"{'has more than once' if name in self._ambiguous else 'does not have'}: log-probabilities cannot be taken from it. "
                "Name the model's own tokenizer, or ask for text without distributions"
            )
        return self._ids[name]


class ChatServer:
    """Generates for conversations; it has nothing that scores. Each sample comes whole."""

    streams = False
    excludes_padding = True

    def __init__(
        self,
        model: ServedModel,
        codec: TextCodec,
        tokens: TokensByBytes | None,
        *,
        limit_field: str = "max_tokens",
        tempered: bool = False,
    ) -> None:
        """`tokens` reads log-probabilities; None for a server without. `limit_field` names the number of new tokens."""
        self._model = model
        self._codec = codec
        self.tokens = tokens
        self.gives_rows = tokens is not None
        self.tempered = tempered
        self._limit_field = limit_field

    def with_tokens(self, *, tempered: bool = False) -> ChatServer:
        """The same for a server that reports log-probabilities, `tempered` ones of the distribution after temperature.

        Raises `StillhouseError` (TOKENIZER_INVALID).
        """
        with tokenizer_errors("--tokenizer cannot be read", "Name a model with a tokenizer.json."):
            tokens = self.tokens or TokensByBytes(dict(self._codec.files())["tokenizer.json"])
        return ChatServer(self._model, self._codec, tokens, limit_field=self._limit_field, tempered=tempered)

    def generate_request(self, item: GenerateInput, top_k: int, *, stream: bool) -> Request:  # noqa: ARG002
        """A chat completion. Raises `StillhouseError` (CAPABILITY) for a prompt that is no conversation."""
        if item.turns is None:
            raise StillhouseError(
                Reason.CAPABILITY,
                "The upstream server only chats, and this prompt is text or token ids. Send a conversation (messages), or use a "
                "server with /v1/completions.",
            )
        if item.top_k:
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"top_k is {item.top_k}, which chat APIs do not have for sampling. Leave it out, or use top_p.",
            )
        body = {
            "model": self._model.adapters[item.adapter] if item.adapter else self._model.name,
            "messages": [_message(each) for each in item.turns.messages],
            "temperature": item.temperature,
            "top_p": item.top_p,
            self._limit_field: item.max_new_tokens,
            **_extras(item.turns),
        }
        if item.seed is not None:
            body["seed"] = item.seed & (2**31 - 1)
        if self.tokens is not None and item.options is not None:
            body["logprobs"] = True
            if top_k:
                body["top_logprobs"] = top_k
        max_bytes = MESSAGE_BYTES + item.max_new_tokens * (top_k + 2) * CANDIDATE_BYTES
        return Request(path=CHAT, body=body, max_bytes=max_bytes)

    def read_piece(self, item: GenerateInput, top_k: int, answer: Any, position: int) -> Piece:
        """Reads a whole sample: ids of the tokens that are named, or else of the text."""
        choices = items(fields(answer).get("choices"), most=1)
        choice = fields(choices[0] if choices else None)
        message, reason = fields(choice.get("message")), choice.get("finish_reason")
        text = message.get("content")
        if not isinstance(reason, str) or reason not in _FINISHES or not isinstance(text, str):
            raise StillhouseError(
                Reason.TEACHER_UNREACHABLE,
                f"The upstream server ended a sample with {str(reason)[:40]!r} instead of text. Ask again, or look into its log.",
            )
        if any(message.get(name) for name in ("tool_calls", "reasoning_content", "reasoning")):
            invalid("cuts calls or reasoning out of its text. Start it without a parser for them")
        if self.tokens is None or item.options is None:
            return self._retokenised(item, text, _FINISHES[reason])
        entries = [
            fields(each)
            for each in items(fields(choice.get("logprobs")).get("content"), most=item.max_new_tokens)
        ]
        if text and not entries:
            invalid("names no tokens of the text that it gives")
        ids = [self.tokens.lookup(each) for each in entries]
        rows = []
        for token, entry in zip(ids, entries, strict=True):
            tops = [fields(each) for each in items(entry.get("top_logprobs") or [], most=max(top_k, 1) + 1)]
            row = {self.tokens.lookup(each): number(each.get("logprob")) for each in tops}
            row.setdefault(token, number(entry.get("logprob")))
            if row[token] <= _UNKNOWN_LOGPROB:
                invalid(
                    "does not tell the log-probability of a token that it has sampled. Lower the temperature, or top_p"
                )
            rows.append(row)
        token_ids = np.array(ids, np.int32)
        require_known(token_ids, self._model)
        found = from_mappings(rows, ids, top_k=top_k, start=position, vocab_size=self._model.vocab_size)
        return Piece(
            token_ids=token_ids,
            logprobs=found.target_logprobs,
            distributions=found,
            finish=_FINISHES[reason],
        )

    def _retokenised(self, item: GenerateInput, text: str, finish: Finish) -> Piece:
        """The text by this teacher's tokenizer, with its end token behind a text that has ended."""
        ids: Int32Array = self._codec.encode_completion(text)[: item.max_new_tokens]
        if finish == "stop" and self._model.eos_token_ids and len(ids) < item.max_new_tokens:
            ids = np.append(ids, np.int32(self._model.eos_token_ids[0]))
        return Piece(token_ids=ids, logprobs=np.zeros(0, np.float32), distributions=None, finish=finish)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as OpenAI's API takes it, where arguments of calls are text."""
    sent = {name: value for name, value in message.items() if value is not None or name == "content"}
    if calls := sent.get("tool_calls"):
        sent["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in calls
        ]
    return sent


def _extras(turns: Turns) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if turns.tools:
        extras["tools"] = list(turns.tools)
    if turns.options:
        extras[OPTIONS] = dict(turns.options)
    return extras
