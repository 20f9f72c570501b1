"""A hosted chat API on a model of transformers: messages in, text out, a few candidates of each token, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.networks.http_server import HttpServer, Received, Reply, http_server


class ChatStub:
    """Answers of one model."""

    def __init__(self, model: Path, *, most: int | None, limit_field: str = "max_tokens") -> None:
        """`most` is the largest top_logprobs; None refuses logprobs. `limit_field` is the name that the limit must have."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._most, self._limit_field = most, limit_field
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def answer(self, request: Received) -> Reply:
        if request.path == "/v1/models":
            return Reply(body={"object": "list", "data": [{"id": "hosted-1", "object": "model"}]})
        if request.path != "/v1/chat/completions":
            return Reply(status=404, body={"error": {"message": "no such path"}})
        body = request.body
        if self._limit_field not in body:
            return Reply(status=400, body={"error": {"message": f"use {self._limit_field}"}})
        if body.get("logprobs") and (self._most is None or body.get("top_logprobs", 0) > self._most):
            return Reply(status=400, body={"error": {"message": f"top_logprobs is at most {self._most}"}})
        return Reply(body={"choices": [self._choice(body)]})

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = self._tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True
        )
        ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        new: list[int] = []
        content: list[dict[str, Any]] = []
        reason = "length"
        for _ in range(body[self._limit_field]):
            with torch.inference_mode():
                logits = self._model(torch.tensor([ids + new])).logits[0, -1][: len(self._tokenizer)]
            token = int(logits.argmax())
            if body["temperature"]:
                token = int(
                    torch.multinomial((logits / body["temperature"]).softmax(-1), 1, generator=generator)
                )
            if token == self._tokenizer.eos_token_id:
                reason = "stop"
                break
            row = logits.log_softmax(-1).numpy()
            best = np.argsort(-row)[: body.get("top_logprobs", 0)]
            content.append(
                self._entry(row, token) | {"top_logprobs": [self._entry(row, int(each)) for each in best]}
            )
            new.append(token)
        message = {"role": "assistant", "content": self._tokenizer.decode(new)}
        logprobs = {"content": content} if body.get("logprobs") else None
        return {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _entry(self, row: Any, token: int) -> dict[str, Any]:
        decoder = self._tokenizer.backend_tokenizer
        text = bytes_of(decoder.id_to_token(token))
        return {"token": text.decode(errors="replace"), "bytes": list(text), "logprob": float(row[token])}


def bytes_of(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary."""
    from stillhouse.protos.tokenizers.tokenizer_json import byte_alphabet

    table = byte_alphabet()
    return bytes(table[char] for char in token) if all(char in table for char in token) else token.encode()


@contextmanager
def chat_server(model: Path, **options: Any) -> Iterator[HttpServer]:
    """A server of it."""
    with http_server(ChatStub(model, **options).answer) as server:
        yield server
