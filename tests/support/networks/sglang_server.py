"""SGLang's native protocol on a model of transformers, byte for byte as its sources define it (0.5.23); no SGLang is run.

Sources: `GenerateReqInput` of sglang/srt/managers/io_struct.py, `add_logprob_to_meta_info` of tokenizer_manager.py, and
test/registered/unit/managers/test_flat_raw_top_logprobs.py.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.networks.http_server import HttpServer, Received, Reply, http_server

MAX_TOKENS = 512


class SglangStub:
    """Answers of one model."""

    def __init__(self, model: Path, *, adapter: Path, flat: bool, tempered: bool = True) -> None:
        """`flat`: a version with flat arrays. `tempered`: SGLANG_RETURN_ORIGINAL_LOGPROB is not set."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._path, self._flat, self._tempered = str(model), flat, tempered
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model: Any = PeftModel.from_pretrained(base, adapter).eval()
        self._generator = torch.Generator().manual_seed(0)

    def answer(self, request: Received) -> Reply:
        match request.path:
            case "/v1/models":
                card = {"id": self._path, "object": "model", "owned_by": "sglang", "root": self._path}
                adapter = card | {"id": "style", "root": "/adapters/style", "parent": self._path}
                cards = [
                    card | {"parent": None, "max_model_len": MAX_TOKENS},
                    adapter | {"max_model_len": None},
                ]
                return Reply(body={"object": "list", "data": cards})
            case "/get_model_info":
                return Reply(
                    body={"model_path": self._path, "is_generation": True, "weight_version": "default"}
                )
            case "/get_server_info":
                return Reply(body={"version": "0.5.23", "max_req_input_len": MAX_TOKENS - 6})
            case "/generate" if len(request.body.get("input_ids", ())) >= MAX_TOKENS - 6:
                return Reply(status=400, body={"error": {"message": "The input is too long."}})
            case "/generate":
                return Reply(body=self._generate(request.body))
        return Reply(status=404, body={"detail": "Not Found"})

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling = body["sampling_params"]
        ids = body["input_ids"] if "input_ids" in body else self._tokenizer.encode(body["text"])
        num_prompt, start, top_k = len(ids), body["logprob_start_len"], body.get("top_logprobs_num") or 0
        adapted = body.get("lora_path") is not None
        rows, whole, kind = [], list(ids), "length"
        for _ in range(sampling["max_new_tokens"]):
            row, token = self._sample(self._logprobs(whole, adapted)[-1], sampling)
            rows.append(row)
            whole.append(token)
            if token in sampling["stop_token_ids"]:
                kind = "stop"
                break
        new = whole[num_prompt:]
        meta: dict[str, Any] = {
            "id": "0" * 32,
            "finish_reason": {"type": kind, "length": len(new)},
            "prompt_tokens": num_prompt,
            "output_token_logprobs": [
                [float(row[token]), token, None] for row, token in zip(rows, new, strict=True)
            ],
            "output_token_logprobs_length": len(new),
        }
        if start >= 0:
            before = self._logprobs(ids, adapted)[start:-1]
            read = [
                [float(row[token]), token, None] for row, token in zip(before, ids[start + 1 :], strict=True)
            ]
            meta["input_token_logprobs"] = [[None, ids[start], None], *read]
            if top_k:
                meta |= self._top(
                    "input", before, top_k, flat=bool(body.get("return_flat_raw_top_logprobs_b64"))
                )
        if top_k:
            meta |= self._top(
                "output",
                np.array(rows),
                top_k,
                flat=bool(body.get("return_flat_raw_output_top_logprobs_b64")),
            )
        return {"text": "", "output_ids": new, "meta_info": meta}

    def _top(self, side: str, rows: Any, top_k: int, *, flat: bool) -> dict[str, Any]:
        if not len(rows):
            return {f"{side}_top_logprobs": []}
        index = np.argsort(-rows, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
        value = (
            np.take_along_axis(rows, index, axis=-1).astype(np.float32)
            if len(rows)
            else index.astype(np.float32)
        )
        name = f"{side}_top_logprobs"
        if flat and self._flat:
            return {
                f"{name}_shape": [len(rows), top_k],
                f"{name}_null_prefix": int(side == "input"),
                f"{name}_val_flat_b64": base64.b64encode(value.tobytes()).decode(),
                f"{name}_idx_flat_b64": base64.b64encode(index.tobytes()).decode(),
                f"{name}_val_flat_b64_dtype": "float32",
                f"{name}_idx_flat_b64_dtype": "int32",
            }
        nested = [
            [[float(each), int(token), None] for each, token in zip(*row, strict=True)]
            for row in zip(value, index, strict=True)
        ]
        return {name: [None, *nested] if side == "input" else nested}

    def _logprobs(self, ids: list[int], adapted: bool) -> Any:
        with torch.inference_mode():
            if adapted:
                logits = self._model(torch.tensor([ids])).logits[0]
            else:
                with self._model.disable_adapter():
                    logits = self._model(torch.tensor([ids])).logits[0]
        return logits.log_softmax(-1).numpy()

    def _sample(self, logprobs: Any, sampling: dict[str, Any]) -> tuple[Any, int]:
        """Reported row and sampled token."""
        temperature = sampling["temperature"]
        if temperature == 0:
            return logprobs, int(logprobs.argmax())
        tempered = torch.from_numpy(logprobs / temperature).log_softmax(-1)
        allowed = tempered.clone()
        if sampling["top_k"] > 0:
            allowed[tempered.argsort(descending=True)[sampling["top_k"] :]] = -torch.inf
        allowed[len(self._tokenizer) :] = -torch.inf
        token = int(torch.multinomial(allowed.exp(), 1, generator=self._generator))
        return (tempered.numpy() if self._tempered else logprobs), token


@contextmanager
def sglang_server(
    model: Path, *, adapter: Path, flat: bool = True, tempered: bool = True
) -> Iterator[HttpServer]:
    """A server with SGLang's protocol."""
    with http_server(SglangStub(model, adapter=adapter, flat=flat, tempered=tempered).answer) as server:
        yield server
