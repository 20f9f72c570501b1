"""Top-k log-probabilities as language models have them: flat, sharp and in between, made up or of a real model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SHAPES = (
    "zipf 0.8",
    "zipf 1",
    "zipf 1.3",
    "zipf 2",
    "normal 1",
    "normal 3",
    "normal 6",
    "peaks 10",
    "peaks 20",
)


def made_up(
    shape: str, *, num_rows: int = 64, top_k: int = 64, vocab_size: int = 8192
) -> NDArray[np.float64]:
    """[num_rows, top_k] of `shape`: a Zipf law with noise, normal logits of a scale, or these with five peaks."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(num_rows, vocab_size))
    kind, _, size = shape.partition(" ")
    if kind == "zipf":
        logits = 0.3 * logits - float(size) * np.log(np.arange(1, vocab_size + 1))
    else:
        logits *= float(size) if kind == "normal" else 3.0
        if kind == "peaks":
            logits[:, :5] += float(size) * np.array([1, 0.8, 0.6, 0.6, 0.6])
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    falling: NDArray[np.float64] = -np.sort(-logprobs, axis=1)[:, :top_k]
    return falling


def of_model(
    directory: Path, *, num_rows: int, top_k: int = 64, temperature: float = 1.0
) -> NDArray[np.float64]:
    """[num_rows, top_k] at positions of the model's held-out text, as tests.support.train_teacher writes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows: list[NDArray[np.float64]] = []
    for line in (directory / "held_out.jsonl").read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:512]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                logprobs = (model(ids).logits[0, :-1].double() / temperature).log_softmax(-1)
            rows.append(logprobs.topk(top_k).values.numpy())
        if sum(map(len, rows)) >= num_rows:
            break
    return np.concatenate(rows)[:num_rows]
