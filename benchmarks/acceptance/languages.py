"""Synthetic languages of known truth, models of them, and exact divergences between models and truth.

A token depends on the two before it. Texts have one character per token. Axes: N sequences, T positions, V tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tests.support.small_models import END, model_config, save_model

VOCABULARY = 48
CHARACTERS = [chr(ord("!") + token) for token in range(VOCABULARY)]
NUM_LOGITS = VOCABULARY + 1
"""Logits of a model: the last is the end token, which no text contains."""
BATCH = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """Log-probabilities [V, V, V]: the last axis is a token's, given the two before it."""

    logprobs: Tensor

    @classmethod
    def dense(cls, seed: int = 0) -> Language:
        """Logits 1.8 A[b] + 1.2 B[a] after a b, with standard normal tables A and B."""
        generator = torch.Generator().manual_seed(seed)
        last, before = (torch.randn(VOCABULARY, VOCABULARY, generator=generator) for _ in range(2))
        return cls(logprobs=(1.8 * last[None, :, :] + 1.2 * before[:, None, :]).log_softmax(-1))

    @classmethod
    def sparse(cls, seed: int = 0, *, successors: int = 10, floor: float = 0.03) -> Language:
        """Few successors of every pair of tokens, with standard normal logits; all tokens share `floor` uniformly."""
        generator = torch.Generator().manual_seed(seed)
        shape = (VOCABULARY, VOCABULARY, VOCABULARY)
        chosen = torch.rand(shape, generator=generator).argsort(-1)[..., :successors]
        logits = torch.randn(shape, generator=generator)
        kept = torch.full(shape, -torch.inf).scatter_(-1, chosen, logits.gather(-1, chosen))
        return cls(logprobs=((1 - floor) * kept.softmax(-1) + floor / VOCABULARY).log())

    def sample(self, count: int, length: int, seed: int) -> Tensor:
        """INT64 [count, length]; the first two tokens are uniform."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(VOCABULARY, (count, length), generator=generator)
        for at in range(2, length):
            probs = self.logprobs[rows[:, at - 2], rows[:, at - 1]].exp()
            rows[:, at] = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
        return rows

    def distributions(self, rows: Tensor) -> Tensor:
        """[N, T - 2, V]: distributions at each position from the third on."""
        return self.logprobs[rows[:, :-2], rows[:, 1:-1]]


def write_rows(rows: Tensor, path: Path) -> Path:
    """Writes JSONL with a field `text`."""
    texts = ("".join(CHARACTERS[token] for token in row) for row in rows.tolist())
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tokenizer() -> Any:
    """Builds a tokenizer with one token per character, and an end token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.WordLevel({each: at for at, each in enumerate([*CHARACTERS, END])}))
    built.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    built.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def new_model(*, width: int, num_layers: int, num_heads: int, length: int, seed: int) -> Any:
    """Builds a model with random weights."""
    from transformers import Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(
            model_config(
                tokenizer(),
                hidden_size=width,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                num_key_value_heads=num_heads,
                intermediate_size=8 * width // 3,
                max_position_embeddings=length,
                vocab_size=NUM_LOGITS,
            )
        )


def write_teacher(language: Language, directory: Path, *, steps: int, length: int) -> Path:
    """Trains a model on `steps` batches of fresh text into a directory; an existing one is kept."""
    if (directory / "tokenizer.json").exists():
        return directory
    model = new_model(width=96, num_layers=2, num_heads=3, length=length, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        rows = language.sample(BATCH, length, seed=1_000_000 + step)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer(), directory)
    return directory


def write_student(directory: Path, *, seed: int, length: int) -> Path:
    """Writes a randomly initialised model to a directory; an existing one is kept."""
    if not (directory / "tokenizer.json").exists():
        save_model(
            new_model(width=48, num_layers=1, num_heads=3, length=length, seed=seed), tokenizer(), directory
        )
    return directory


def load(directory: Path) -> Any:
    """Loads a model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def kl_from_truth(language: Language, model: Any, rows: Tensor) -> float:
    """Mean over positions of KL(truth || model), in nats."""
    truth, student = language.distributions(rows), _logprobs(model, rows)[:, 1:, :VOCABULARY]
    return float((truth.exp() * (truth - student)).sum(-1).mean())


@torch.no_grad()
def on_policy_kl(student: Any, teacher: Any, *, count: int, length: int, seed: int) -> tuple[float, float]:
    """Mean KL(student || teacher) and KL(teacher || student) over positions of the student's samples, in nats."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCABULARY, (count, 1), generator=generator)
    for _ in range(length - 1):
        probs = student(input_ids=rows, use_cache=False).logits[:, -1].softmax(-1)
        rows = torch.cat([rows, torch.multinomial(probs, 1, generator=generator)], dim=1)
    q, p = _logprobs(student, rows), _logprobs(teacher, rows)
    reverse, forward = (q.exp() * (q - p)).sum(-1).mean(), (p.exp() * (p - q)).sum(-1).mean()
    return float(reverse), float(forward)


def _logprobs(model: Any, rows: Tensor) -> Tensor:
    """[N, T - 1, V]: distributions from the second token on."""
    return cast("Tensor", model(input_ids=rows, use_cache=False).logits[:, :-1].log_softmax(-1))
