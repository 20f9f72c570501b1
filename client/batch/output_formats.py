"""Formats results as output lines: plain rows, training data, and OpenAI's batch output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import grpc
import numpy as np

from stillhouse.client.batch.dispatcher import RowResult
from stillhouse.client.batch.input_rows import PromptRow, invalid
from stillhouse.client.batch.journal import RowRecord
from stillhouse.client.core.json_output import dumps, error_as_json
from stillhouse.client.teacher.generate import Completion
from stillhouse.client.teacher.tool_calls import Format, choice_fields, parse
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.conversation import OPTIONS
from stillhouse.protos.rows.known_fields import PROMPTS, SETTINGS, STUDENT_PROMPT
from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson, tokenizer_errors

Output = Literal["plain", "dataset", "openai"]

_HTTP = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNIMPLEMENTED: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


def plain(answer: RowResult) -> RowRecord:
    """Copies the row with `completions` and `usage`, and `error` if it failed."""
    row = answer.row
    document: dict[str, Any] = {
        "id": row.id,
        **{key: row.values[key] for key in row.values if key != "error"},
    }
    document["completions"] = [
        _plain_completion(each, with_ids="token_ids" in row.values)
        for _, each in sorted(answer.completions.items())
    ]
    document["usage"] = _usage(answer)
    if answer.error is not None:
        document["error"] = error_as_json(answer.error)
    return RowRecord(digest=row.line.digest, out=_line(document), is_failed=answer.error is not None)


def _plain_completion(completion: Completion, *, with_ids: bool) -> dict[str, Any]:
    document: dict[str, Any] = {"text": completion.text, "finish_reason": completion.finish or None}
    if with_ids:
        document["token_ids"] = completion.token_ids.tolist()
    document |= _likelihood(completion)
    if completion.error is not None:
        document["error"] = error_as_json(completion.error)
    return document


def dataset(answer: RowResult) -> RowRecord:
    """Formats training data, a row per sample: `prompt` and `completion`, or `messages` with the completion as last turn.

    A row with a failed sample yields none.
    """
    row = answer.row
    if answer.error is not None:
        failed = {"id": row.id, "line": row.line.line_number, "error": error_as_json(answer.error)}
        return RowRecord(digest=row.line.digest, out="", failed=_line(failed), is_failed=True)
    kept: dict[str, Any] = {"id": row.id}
    if not row.interface:
        own = (STUDENT_PROMPT, "system", OPTIONS) if row.values.get(STUDENT_PROMPT) is not None else ()
        kept |= {key: row.values[key] for key in row.values if key not in (*PROMPTS, *SETTINGS, *own)}
    lines = []
    for (prompt, _), completion in sorted(answer.completions.items()):
        written = {**(row.content[prompt] or {})}
        turn = {"role": "assistant", "content": completion.text}
        if "messages" in written:
            written["messages"] = [*written["messages"], turn]
        else:
            written["completion"] = completion.text if isinstance(written["prompt"], str) else [turn]
        lines.append(
            _line({**kept, **written, "finish_reason": completion.finish, **_likelihood(completion)})
        )
    return RowRecord(digest=row.line.digest, out="".join(lines))


def _likelihood(completion: Completion) -> dict[str, Any]:
    """Returns the number of tokens and the mean of their log-probabilities at temperature 1, if they were captured."""
    distributions = completion.distributions
    if distributions is None or not len(completion.token_ids):
        return {}
    mean = float(distributions.target_logprobs.astype(np.float64).mean())
    return {"num_tokens": len(completion.token_ids), "mean_logprob": mean}


def require_text(row: PromptRow) -> PromptRow:
    """Returns the row, with an error if it has no text for training data."""
    if row.error is not None or None not in row.content:
        return row
    error = invalid(
        f"Line {row.line.line_number} has token ids, but training data needs text. Give prompt or messages, or write "
        "plain rows."
    )
    return replace(row, error=error)


class TokenTexts:
    """Bytes of every token of one tokenizer, from the tokenizer.json that a teacher sends; none of it is executed."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Raises StillhouseError (TOKENIZER_INVALID) for a file that does not describe a tokenizer."""
        with tokenizer_errors(
            "Token texts cannot be read from the teacher's tokenizer.json", "Request no logprobs."
        ):
            tokenizer = TokenizerJson(tokenizer_json)
            self._bytes = tokenizer.vocab_bytes()
            for token in tokenizer.added:
                self._bytes[token.id] = token.content.encode("utf-8", "replace")

    def text(self, token: int) -> str:
        """Returns the text of one token; an incomplete character becomes U+FFFD."""
        return self._bytes.get(token, b"").decode("utf-8", "replace")

    def as_json(self, token: int, logprob: float) -> dict[str, Any]:
        """Returns the token in OpenAI's format."""
        return {"token": self.text(token), "logprob": logprob, "bytes": list(self._bytes.get(token, b""))}


class OpenAi:
    """Formats OpenAI's batch output; `created` is the same for all rows, and ids are derived from the rows."""

    def __init__(
        self,
        *,
        created_s: int,
        model: str,
        fingerprint: str,
        token_texts: Callable[[], TokenTexts],
        tool_format: Callable[[], Format | None],
    ) -> None:
        """`model` is that of rows without an adapter; `token_texts` is called if logprobs are requested, `tool_format` if
        there are tools."""
        self._created_s = created_s
        self._model = model
        self._fingerprint = f"fp_{fingerprint[:10]}"
        self._token_texts = token_texts
        self._tool_format = tool_format

    def __call__(self, answer: RowResult) -> RowRecord:
        """Formats the line of one row."""
        row = answer.row
        digest = hashlib.blake2b(f"{row.line.number} {row.line.digest}".encode(), digest_size=12).hexdigest()
        error = answer.error
        status, body = (200, self._body(answer, digest)) if error is None else (_status(error), _error(error))
        document = {
            "id": f"batch_req_{digest}",
            "custom_id": row.id,
            "response": {"status_code": status, "request_id": f"req_{digest}", "body": body},
            "error": None if error is None else {"code": str(error.reason), "message": error.message},
        }
        return RowRecord(digest=row.line.digest, out=_line(document), is_failed=error is not None)

    def _body(self, answer: RowResult, digest: str) -> dict[str, Any]:
        row = answer.row
        is_chat = row.interface == "chat"
        choices = [
            (self._chat_choice if is_chat else self._text_choice)(answer, index, completion)
            for index, (_, completion) in enumerate(sorted(answer.completions.items()))
        ]
        return {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{digest}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": self._created_s,
            "model": row.prompts[0].adapter or self._model,
            "choices": choices,
            "usage": _usage(answer),
            "system_fingerprint": self._fingerprint,
        }

    def _chat_choice(self, answer: RowResult, index: int, completion: Completion) -> dict[str, Any]:
        logprobs = None
        if answer.row.top_logprobs is not None:
            logprobs = {"content": self._chat_logprobs(completion, answer.row.top_logprobs), "refusal": None}
        has_tools = any(each is not None and "tools" in each for each in answer.row.content)
        parsed = parse(completion.text, self._tool_format() if has_tools else None)
        fields, finish = choice_fields(parsed, completion.finish)
        return {
            "index": index,
            "message": {"role": "assistant", "refusal": None, **fields},
            "logprobs": logprobs,
            "finish_reason": finish,
        }

    def _chat_logprobs(self, completion: Completion, top: int) -> list[dict[str, Any]]:
        texts = self._token_texts()
        return [
            {
                **texts.as_json(token, logprob),
                "top_logprobs": [texts.as_json(*each) for each in candidates[:top]],
            }
            for token, logprob, candidates in _positions(completion)
        ]

    def _text_choice(self, answer: RowResult, index: int, completion: Completion) -> dict[str, Any]:
        logprobs = None
        if answer.row.top_logprobs is not None:
            logprobs = self._text_logprobs(completion, answer.row.top_logprobs)
        return {
            "index": index,
            "text": completion.text,
            "logprobs": logprobs,
            "finish_reason": completion.finish,
        }

    def _text_logprobs(self, completion: Completion, top: int) -> dict[str, Any]:
        texts = self._token_texts()
        tokens, logprobs, tops, offsets = [], [], [], []
        offset = 0
        for token, logprob, candidates in _positions(completion):
            tokens.append(texts.text(token))
            logprobs.append(logprob)
            tops.append({texts.text(other): value for other, value in candidates[:top]})
            offsets.append(offset)
            offset += len(tokens[-1])
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _positions(completion: Completion) -> Sequence[tuple[int, float, list[tuple[int, float]]]]:
    """Returns for each token its id, its logprob at temperature 1, and its top-k candidates."""
    distributions = completion.distributions
    if distributions is None:  # no token was generated
        return []
    positions = []
    for row, token in enumerate(completion.token_ids.tolist()):
        token_ids, logprobs = distributions.token_ids[row].tolist(), distributions.logprobs[row].tolist()
        candidates = list(zip(token_ids, logprobs, strict=True))
        positions.append((token, float(distributions.target_logprobs[row]), candidates))
    return positions


def _status(error: StillhouseError) -> int:
    return _HTTP.get(error.code, 500)


def _error(error: StillhouseError) -> dict[str, Any]:
    kind = "invalid_request_error" if _status(error) < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": None, "code": str(error.reason)}}


def _usage(answer: RowResult) -> dict[str, int]:
    prompts: dict[int, int] = {}
    for (prompt, _), completion in answer.completions.items():
        prompts[prompt] = max(prompts.get(prompt, 0), completion.prompt_tokens)
    generated = sum(len(each.token_ids) for each in answer.completions.values())
    read = sum(prompts.values())
    return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}


def _line(document: Mapping[str, Any]) -> str:
    try:
        line = json.dumps(document, ensure_ascii=False, allow_nan=False)
        line.encode()
    except UnicodeEncodeError:  # an unpaired surrogate, from an escape in the input
        line = json.dumps(document)
    except ValueError:
        line = dumps(document)
    return line + "\n"


def is_failed(line: bytes) -> bool:
    """Returns True if a line of a plain or an OpenAI output reports an error."""
    return json.loads(line).get("error") is not None
