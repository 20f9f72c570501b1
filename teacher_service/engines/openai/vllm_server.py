"""vLLM's server: /v1/completions, and its token endpoint /inference/v1/generate, which adds queried ids."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.lib import format as untyped_format

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import Finish, Float32Array, GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.openai.dialect import (
    MESSAGE_BYTES,
    Piece,
    ServedModel,
    require_known,
)
from stillhouse.teacher_service.engines.openai.http_client import Request
from stillhouse.teacher_service.engines.openai.rows import (
    fields,
    from_mappings,
    invalid,
    items,
    number,
    token_id,
    token_ids,
)

COMPLETIONS, TOKENS = "/v1/completions", "/inference/v1/generate"
CANDIDATE_BYTES = 256
"""Bytes of one candidate in JSON, with its text."""
STREAM_INTERVAL_TOKENS = 16
MAX_BIASED_IDS = 1024
"""Most ids that vLLM's logit_bias takes; so much padding of the output layer is excluded from samples."""
_NOT_SAMPLED = -100.0
_NPY: Any = untyped_format
_TOKEN = "token_id:"  # noqa: S105 - the form of a token in an answer
_FINISHES: dict[Any, Finish] = {None: "", "stop": "stop", "length": "length"}


class VllmServer:
    """Requests of vLLM's own fields. Its rows are raw, at temperature 1, unless it was started with another --logprobs-mode."""

    streams = True
    tempered = False
    gives_rows = True

    def __init__(self, model: ServedModel, *, takes_tokens: bool, max_query_tokens: int = 0) -> None:
        """`takes_tokens`: it has the token endpoint, whose answers are smaller."""
        self._model = model
        self._takes_tokens = takes_tokens
        self.max_query_tokens = max_query_tokens
        padding = model.padding
        self._bias = (
            {str(each): _NOT_SAMPLED for each in padding} if 0 < len(padding) <= MAX_BIASED_IDS else None
        )
        self.excludes_padding = self._bias is not None

    def score_request(self, item: ScoreInput, top_k: int) -> Request:
        """The prompt with `prompt_logprobs`. vLLM needs room for one token more, so the last token of a sequence of full
        length is the one to generate.

        Raises `StillhouseError` (SEQUENCE_TOO_LONG) for queries in a sequence of full length.
        """
        ids = item.token_ids.tolist()
        max_bytes = MESSAGE_BYTES + len(ids) * (top_k + 1) * CANDIDATE_BYTES
        if len(ids) >= self._model.max_sequence_tokens:
            if item.query_token_ids is not None:
                raise StillhouseError(
                    Reason.SEQUENCE_TOO_LONG,
                    f"The sequence has {len(ids)} tokens; with query_token_ids this teacher takes {len(ids) - 1}. Shorten it, or "
                    "leave the queries out.",
                )
            body = {
                "prompt": ids[:-1],
                "prompt_logprobs": top_k,
                "logprobs": top_k,
                "allowed_token_ids": ids[-1:],
                "return_tokens_as_token_ids": True,
            }
            return self._completions(body, item.adapter, max_bytes, max_tokens=1, temperature=0.0)
        if not self._takes_tokens:
            body = {"prompt": ids, "prompt_logprobs": top_k}
            return self._completions(body, item.adapter, max_bytes, max_tokens=1, temperature=0.0)
        params = {"prompt_logprobs": top_k, "max_tokens": 1, "temperature": 0.0, "detokenize": False}
        if item.query_token_ids is not None:
            params["prompt_logprob_token_ids"] = item.query_token_ids.tolist()
            params["prompt_logprob_start"] = item.start - 1
            max_bytes += item.query_token_ids.size * 6
        body = {"model": self._name(item.adapter), "token_ids": ids, "sampling_params": params}
        return Request(path=TOKENS, body=body, max_bytes=max_bytes)

    def read_scores(self, item: ScoreInput, top_k: int, answer: Any) -> Distributions:
        """Reads `prompt_logprobs`, of the complete prompt, and the row of a forced token."""
        ids = item.token_ids.tolist()
        forced = len(ids) >= self._model.max_sequence_tokens
        if not forced and self._takes_tokens:
            found, choice = fields(answer), {}
        else:
            found = choice = _choice(answer)
        prompt_length = len(ids) - forced
        rows = items(found.get("prompt_logprobs"), most=prompt_length)
        if len(rows) != prompt_length:
            invalid(f"gives {len(rows)} rows for a prompt of {prompt_length} tokens")
        mappings = [_prompt_row(row) for row in rows[item.start :]]
        if forced:
            rows, chosen = _sampled_rows(choice, most=1)
            if chosen != ids[-1:]:
                invalid("generates another token than the only one that was allowed")
            mappings += rows
        scores = from_mappings(
            mappings,
            ids[item.start :],
            top_k=top_k,
            start=item.start,
            vocab_size=self._model.vocab_size,
        )
        if item.query_token_ids is None:
            return scores
        queried = _npy(found.get("prompt_token_id_logprobs"), item.query_token_ids.shape)
        absent = item.query_token_ids < 0
        if not np.isfinite(queried[~absent]).all() or (queried > 1e-3).any():
            invalid("gives log-probabilities of queried ids that are not finite, or above 0")
        return replace(scores, query_logprobs=np.where(absent, -np.inf, queried).astype(np.float32))

    def generate_request(self, item: GenerateInput, top_k: int, *, stream: bool) -> Request:
        """A completion with its ids and, of each token, `top_k` candidates and its own log-probability."""
        room = self._model.max_sequence_tokens - len(item.token_ids)
        num_new = min(item.max_new_tokens, room)
        body: dict[str, Any] = {
            "prompt": item.token_ids.tolist(),
            "top_p": item.top_p,
            "top_k": item.top_k if 0 < item.top_k < self._model.vocab_size else 0,
            "logprobs": top_k,
            "stop_token_ids": list(self._model.eos_token_ids),
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream": stream,
            "stream_interval": STREAM_INTERVAL_TOKENS,
        }
        if item.seed is not None:
            body["seed"] = item.seed & (2**63 - 1)
        if self._bias is not None:
            body["logit_bias"] = self._bias
        tokens = num_new * (top_k + 2) * CANDIDATE_BYTES + len(item.token_ids) * 16
        per_event = num_new * 1024 if stream else 0
        return self._completions(
            body,
            item.adapter,
            MESSAGE_BYTES + tokens + per_event,
            max_tokens=num_new,
            temperature=item.temperature,
        )

    def read_piece(self, item: GenerateInput, top_k: int, answer: Any, position: int) -> Piece:
        """Reads one event of a stream, or a complete answer."""
        choice = _choice(answer)
        reason = choice.get("finish_reason")
        if not isinstance(reason, str | None) or reason not in _FINISHES:
            raise StillhouseError(
                Reason.TEACHER_UNREACHABLE,
                "The upstream server ended a sample before its end. Look into its log, and ask again.",
            )
        room = self._model.max_sequence_tokens - position
        ids = token_ids(choice.get("token_ids") or [], most=min(item.max_new_tokens, room))
        if not ids:
            return Piece(
                token_ids=np.zeros(0, np.int32),
                logprobs=np.zeros(0, np.float32),
                distributions=None,
                finish=_FINISHES[reason],
            )
        require_known(np.array(ids, np.int32), self._model)
        rows, named = _sampled_rows(choice, most=len(ids))
        if named != ids:
            invalid("gives rows of other tokens than it generates")
        found = from_mappings(rows, ids, top_k=top_k, start=position, vocab_size=self._model.vocab_size)
        logprobs: Float32Array = found.target_logprobs
        return Piece(
            token_ids=np.array(ids, np.int32),
            logprobs=logprobs,
            distributions=found,
            finish=_FINISHES[reason],
        )

    def _completions(
        self, body: dict[str, Any], adapter: str, max_bytes: int, *, max_tokens: int, temperature: float
    ) -> Request:
        # Fields that are left out come from the model's generation_config on the server.
        plain = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        whole = {
            "model": self._name(adapter),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            **plain,
            **body,
        }
        return Request(path=COMPLETIONS, body=whole, max_bytes=max_bytes)

    def _name(self, adapter: str) -> str:
        return self._model.adapters[adapter] if adapter else self._model.name


def _choice(answer: Any) -> dict[str, Any]:
    document = fields(answer)
    if "error" in document:
        raise StillhouseError(
            Reason.TEACHER_UNREACHABLE,
            "The upstream server failed in the middle of an answer. Look into its log, and ask again.",
        )
    choices = items(document.get("choices"), most=1)
    if not choices:
        return {"finish_reason": None, "token_ids": []}
    return fields(choices[0])


def _prompt_row(row: Any) -> dict[int, float]:
    found = {token_id(name): number(fields(each).get("logprob")) for name, each in fields(row).items()}
    if len(found) != len(row):
        invalid("names a token twice at one position")
    return found


def _sampled_rows(choice: dict[str, Any], *, most: int) -> tuple[list[dict[int, float]], list[int]]:
    """Rows of generated tokens, each with the token itself, and these tokens."""
    logprobs = fields(choice.get("logprobs"))
    tokens = items(logprobs.get("tokens"), most=most)
    chosen = [_named_id(each) for each in tokens]
    own = items(logprobs.get("token_logprobs"), most=len(chosen))
    tops = items(logprobs.get("top_logprobs"), most=len(chosen))
    rows = []
    for token, value, top in zip(chosen, own, tops, strict=False):
        row = {_named_id(name): number(each) for name, each in fields(top or {}).items()}
        row.setdefault(token, number(value))
        rows.append(row)
    if len(rows) != len(chosen):
        invalid(f"gives {len(rows)} rows for {len(chosen)} generated tokens")
    return rows, chosen


def _named_id(value: Any) -> int:
    if not isinstance(value, str) or not value.startswith(_TOKEN):
        invalid("names tokens by their text, although it was asked for their ids")
    return token_id(value[len(_TOKEN) :])


def _npy(value: Any, shape: tuple[int, ...]) -> Float32Array:
    """FLOAT32 array of this shape from base64 of a .npy file, whose header is checked before anything is allocated."""
    try:
        content = base64.b64decode(value, validate=True)
        file = io.BytesIO(content)
        version = _NPY.read_magic(file)
        read = _NPY.read_array_header_1_0 if version == (1, 0) else _NPY.read_array_header_2_0
        found, fortran, dtype = read(file)
    except (TypeError, ValueError, binascii.Error, EOFError) as error:
        raise StillhouseError(
            Reason.TENSOR_INVALID, "The upstream server gives queried log-probabilities that cannot be read."
        ) from error
    data = content[file.tell() :]
    if found != shape or fortran or dtype != np.dtype("<f4") or len(data) != 4 * int(np.prod(shape)):
        invalid(f"gives queried log-probabilities of shape {list(found)} for queries of shape {list(shape)}")
    return np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)
