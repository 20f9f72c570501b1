"""Rows and tokenizer that all architectures share, and what transformers computes of them in float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.small_models import make_tokenizer
from tests.support.texts import sentences

VOCAB_SIZE = 200
"""Below the teacher's largest top-k, so that targets have the whole distribution."""
MOMENTUM = 0.9
"""That of the product's sgd."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Rows to train on and rows that are held out, as files."""

    tokenizer: Any
    train: Path
    held_out: Path

    @classmethod
    def make(cls, folder: Path) -> Corpus:
        """Three rows of different lengths to train on, two to evaluate on."""
        from transformers import AutoTokenizer

        texts = list(sentences(100, seed=1))
        tokenizer = AutoTokenizer.from_pretrained(
            make_tokenizer(texts, folder / "tokenizer", VOCAB_SIZE, full_alphabet=False)
        )
        rows = {
            "train": (texts[0], texts[1][:20], texts[2][:35]),
            "held_out": (texts[3], texts[4][:25]),
        }
        for name, several in rows.items():
            (folder / name).with_suffix(".jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in several)
            )
        return cls(tokenizer=tokenizer, train=folder / "train.jsonl", held_out=folder / "held_out.jsonl")


def token_ids(rows: Path, model: Path) -> list[list[int]]:
    """Ids of the texts in a file by the tokenizer in a model's directory, whose class transformers takes from the model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(json.loads(line)["text"])["input_ids"] for line in rows.read_text().splitlines()]


def load(directory: Path) -> Any:
    """The model in a directory, with all of its weights."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.eval()


def logprobs(model: Any, ids: Sequence[int]) -> Tensor:
    """[T, V]: row t is the distribution of the token behind ids[: t + 1], from one pass over the row alone."""
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits[0].log_softmax(-1)


def mean_cross_entropy(model: Any, rows: Sequence[Sequence[int]]) -> float:
    """In nats a token, over all tokens but the first of each row."""
    with torch.no_grad():
        losses = torch.cat([-_of_targets(logprobs(model, ids), ids) for ids in rows])
    return float(losses.mean())


def trained(model: Any, rows: Sequence[Sequence[int]], *, steps: int, rate: float) -> Any:
    """`model` after steps on cross-entropy plus KL(teacher || student), its teacher being itself before the first."""
    with torch.no_grad():
        targets = [logprobs(model, ids) for ids in rows]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    model.train()
    for _ in range(steps):
        parts = []
        for ids, target in zip(rows, targets, strict=True):
            own = logprobs(model, ids)
            kl = (target.exp() * (target - own)).sum(-1)[:-1]
            parts.append(kl - _of_targets(own, ids))
        optimizer.zero_grad()
        torch.autograd.backward(torch.cat(parts).mean())
        optimizer.step()
    return model.eval()


def _of_targets(logprobs_TV: Tensor, ids: Sequence[int]) -> Tensor:
    return logprobs_TV[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
