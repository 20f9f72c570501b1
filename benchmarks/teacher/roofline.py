"""Cost of the model in torch alone: body, output layer, selection of the top k; and transformers' plain top-k.

Run as `python -m benchmarks.teacher.roofline MODEL DTYPE`; requests and responses are lines of JSON.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import torch

from benchmarks.teacher.json_worker import keep_stdout, serve_lines
from benchmarks.teacher.timed_pass import PassInput

SELECT_ROWS = 16
"""Rows per log-sum-exp: their float32 copies stay in the cache."""
HEAD_ROWS = 256
"""Rows per matmul of the output layer."""


class TorchModel:
    """A model on this machine's device."""

    def __init__(self, path: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self._model = model.to(self._device).eval()

    @torch.inference_mode()
    def costs(self, work: PassInput, top_k: int) -> dict[str, float]:
        """Seconds per token of each part: the lower bound of a top-k response on this device."""
        ids_BT = self._ids(work)
        num_tokens = ids_BT.numel()
        body = head = select = 0.0
        begin = self._now()
        hidden_NH = self._model.model(ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
        body = self._now() - begin
        for rows_NH in hidden_NH.split(HEAD_ROWS):
            begin = self._now()
            logits_NV = self._model.lm_head(rows_NH)
            middle = self._now()
            values_NK, _ = logits_NV.topk(top_k, dim=-1)
            partitions_N = torch.cat(
                [part.float().logsumexp(dim=-1) for part in logits_NV.split(SELECT_ROWS)]
            )
            (values_NK.float() - partitions_N[:, None]).exp_().sum(-1)
            head += middle - begin
            select += self._now() - middle
        return {"body": body / num_tokens, "head": head / num_tokens, "select": select / num_tokens}

    @torch.inference_mode()
    def transformers(self, work: PassInput, top_k: int) -> float:
        """Seconds of one pass, a sequence at a time: forward, log_softmax, topk, arrays on the host."""
        ids_BT = self._ids(work)
        begin = self._now()
        for ids_T in ids_BT:
            logits_TV = self._model(ids_T[None], use_cache=False).logits[0]
            logprobs_TK, token_ids_TK = logits_TV.float().log_softmax(dim=-1).topk(top_k, dim=-1)
            logprobs_TK.cpu().numpy()
            token_ids_TK.cpu().numpy()
        return self._now() - begin

    def _ids(self, work: PassInput) -> Any:
        return torch.tensor([each.tolist() for each in work.sequences()], device=self._device)

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    """Serves requests until stdin ends."""
    answers = keep_stdout()
    model = TorchModel(*sys.argv[1:])

    async def answer(request: dict[str, Any]) -> Any:
        torch.set_num_threads(request["threads"])
        work = PassInput(**request["work"])
        return getattr(model, request["kind"])(work, request["top_k"])

    asyncio.run(serve_lines(answers, "ready", answer))


if __name__ == "__main__":
    main()
