"""SGLang's server: its native /generate, with top-k as flat binary arrays where its version has them."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import Finish, GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.openai.dialect import (
    MESSAGE_BYTES,
    Piece,
    ServedModel,
    require_known,
)
from stillhouse.teacher_service.engines.openai.http_client import Request
from stillhouse.teacher_service.engines.openai.rows import (
    Float64Array,
    Int64Array,
    fields,
    invalid,
    items,
    number,
    to_distributions,
    token_id,
)

GENERATE = "/generate"
CANDIDATE_BYTES = 64
"""Bytes of one candidate as a JSON list of number, id and null; as binary it has 11."""
_FINISHES: dict[Any, Finish] = {"stop": "stop", "length": "length"}


class SglangServer:
    """Requests of SGLang's own fields.

    Samples come whole. Unless SGLANG_RETURN_ORIGINAL_LOGPROB is set there, its rows of generated tokens are of the
    distribution after temperature. Only a server with --enable-deterministic-inference keeps seeds; old ones refuse them.
    """

    streams = False
    gives_rows = True
    max_query_tokens = 0
    excludes_padding = False

    def __init__(self, model: ServedModel, *, tempered: bool = True, sends_seeds: bool = True) -> None:
        self._model = model
        self.tempered = tempered
        self._sends_seeds = sends_seeds

    def score_request(self, item: ScoreInput, top_k: int) -> Request:
        """A prompt without new tokens, with rows from the one that predicts `start` on."""
        body = {
            **self._common(item.token_ids.tolist(), item.adapter, top_k, item.start - 1),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        }
        num_rows = len(item.token_ids) - item.start
        max_bytes = MESSAGE_BYTES + len(item.token_ids) * 64 + num_rows * (top_k + 1) * CANDIDATE_BYTES
        return Request(path=GENERATE, body=body, max_bytes=max_bytes)

    def read_scores(self, item: ScoreInput, top_k: int, answer: Any) -> Distributions:
        """Reads the rows of a prompt; the first entry, of the token before `start`, has no value."""
        meta = _meta(answer)
        num_rows = len(item.token_ids) - item.start
        targets = items(meta.get("input_token_logprobs"), most=num_rows + 1)
        if len(targets) != num_rows + 1:
            invalid(f"gives {len(targets)} log-probabilities for {num_rows + 1} tokens of a prompt")
        logprobs, ids = _entries(targets[1:])
        if ids != item.token_ids[item.start :].tolist():
            invalid("scores other tokens than it was given")
        candidates = _flat(meta, "input", num_rows, top_k)
        if candidates is None:
            nested = [[]] * (num_rows + 1) if top_k == 0 else meta.get("input_top_logprobs")
            rows = items(nested, most=num_rows + 1)
            if len(rows) != num_rows + 1:
                invalid(f"gives {len(rows)} rows for {num_rows + 1} tokens of a prompt")
            candidates = _nested(rows[1:], top_k)
        return to_distributions(
            *candidates, np.array(logprobs), top_k=top_k, start=item.start, vocab_size=self._model.vocab_size
        )

    def generate_request(self, item: GenerateInput, top_k: int, *, stream: bool) -> Request:  # noqa: ARG002
        """One whole sample with the rows of its tokens."""
        num_new = min(item.max_new_tokens, self._model.max_sequence_tokens - len(item.token_ids))
        params: dict[str, Any] = {
            "max_new_tokens": num_new,
            "temperature": item.temperature,
            "top_p": item.top_p,
            "top_k": item.top_k if 0 < item.top_k < self._model.vocab_size else -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(self._model.eos_token_ids),
            "skip_special_tokens": False,
        }
        if item.seed is not None and self._sends_seeds:
            params["sampling_seed"] = item.seed & (2**31 - 1)
        body = {
            **self._common(item.token_ids.tolist(), item.adapter, top_k, -1),
            "sampling_params": params,
            "return_flat_raw_output_top_logprobs": True,
            "return_flat_raw_output_top_logprobs_b64": True,
        }
        max_bytes = MESSAGE_BYTES + num_new * (top_k + 6) * CANDIDATE_BYTES + len(item.token_ids) * 16
        return Request(path=GENERATE, body=body, max_bytes=max_bytes)

    def read_piece(self, item: GenerateInput, top_k: int, answer: Any, position: int) -> Piece:
        """Reads a whole sample."""
        meta = _meta(answer)
        reason = meta.get("finish_reason")
        kind = reason.get("type") if isinstance(reason, dict) else reason
        if not isinstance(kind, str) or kind not in _FINISHES:
            raise StillhouseError(
                Reason.TEACHER_UNREACHABLE,
                "The upstream server ended a sample before its end. Look into its log, and ask again.",
            )
        entries = items(meta.get("output_token_logprobs"), most=item.max_new_tokens)
        logprobs, ids = _entries(entries)
        token_ids = np.array(ids, np.int32)
        require_known(token_ids, self._model)
        candidates = _flat(meta, "output", len(ids), top_k)
        if candidates is None:
            nested = [[]] * len(ids) if top_k == 0 else meta.get("output_top_logprobs")
            rows = items(nested, most=len(ids))
            if len(rows) != len(ids):
                invalid(f"gives {len(rows)} rows for {len(ids)} generated tokens")
            candidates = _nested(rows, top_k)
        found = to_distributions(
            *candidates, np.array(logprobs), top_k=top_k, start=position, vocab_size=self._model.vocab_size
        )
        return Piece(
            token_ids=token_ids,
            logprobs=found.target_logprobs,
            distributions=found,
            finish=_FINISHES[kind],
        )

    def _common(self, ids: list[int], adapter: str, top_k: int, start: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "input_ids": ids,
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": top_k,
            "return_text_in_logprobs": False,
            "stream": False,
        }
        if top_k:
            body["return_flat_raw_top_logprobs"] = body["return_flat_raw_top_logprobs_b64"] = True
        if adapter:
            body["lora_path"] = self._model.adapters[adapter]
        return body


def _meta(answer: Any) -> dict[str, Any]:
    document = fields(answer)
    if "error" in document and "meta_info" not in document:
        raise StillhouseError(
            Reason.TEACHER_UNREACHABLE,
            "The upstream server failed at a request. Look into its log, and ask again.",
        )
    return fields(document.get("meta_info"))


def _entries(entries: list[Any]) -> tuple[list[float], list[int]]:
    """Log-probability and id of entries `[logprob, id, text]`."""
    logprobs, ids = [], []
    for entry in entries:
        parts = items(entry, most=3)
        if len(parts) < 2:
            invalid("gives an entry without log-probability and id")
        logprobs.append(number(parts[0]))
        ids.append(token_id(parts[1]))
    return logprobs, ids


def _nested(rows: list[Any], top_k: int) -> tuple[Int64Array, Float64Array]:
    """[T, K] ids and log-probabilities of rows of entries."""
    ids_TK = np.full((len(rows), top_k), -1, np.int64)
    logprobs_TK = np.zeros((len(rows), top_k))
    for index, row in enumerate(rows):
        logprobs, ids = _entries(items(row, most=top_k))
        ids_TK[index, : len(ids)] = ids
        logprobs_TK[index, : len(ids)] = logprobs
    return ids_TK, logprobs_TK


def _flat(
    meta: dict[str, Any], side: str, num_rows: int, top_k: int
) -> tuple[Int64Array, Float64Array] | None:
    """[T, K] ids and log-probabilities of flat arrays; None where the server sends none.

    The shape is that of the rows after the first `null_prefix` tokens, which have none: of a prompt one, of a sample none.
    """
    name = f"{side}_top_logprobs"
    value, index = (meta.get(f"{name}_{part}_flat_b64") for part in ("val", "idx"))
    if top_k == 0 or value is None or index is None:
        return None
    prefix = 1 if side == "input" else 0
    shape = meta.get(f"{name}_shape")
    if shape != [num_rows, top_k] or meta.get(f"{name}_null_prefix", prefix) != prefix:
        invalid(f"gives rows of shape {str(shape)[:40]} where [{num_rows}, {top_k}] were requested")
    dtypes = (meta.get(f"{name}_val_flat_b64_dtype"), meta.get(f"{name}_idx_flat_b64_dtype"))
    if dtypes != ("float32", "int32"):
        invalid("gives rows of other types than float32 and int32")
    logprobs_TK = _array(value, "<f4", num_rows, top_k).astype(np.float64)
    return _array(index, "<i4", num_rows, top_k).astype(np.int64), logprobs_TK


def _array(value: Any, dtype: str, num_rows: int, top_k: int) -> np.ndarray[Any, Any]:
    try:
        content = base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        invalid("gives an array that is not base64")
    if len(content) != 4 * num_rows * top_k:
        invalid(f"gives an array of {len(content)} bytes where {4 * num_rows * top_k} were requested")
    return np.frombuffer(content, dtype).reshape(num_rows, top_k)
