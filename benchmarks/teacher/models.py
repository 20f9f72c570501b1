"""Random teachers, and a synthetic tokenizer shared by all: token ids whose text is as long as real text.

With random weights only a model's shape matters, its cost, not its quality.
"""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass
from pathlib import Path

from tests.support.small_models import SPECIAL_TOKENS, model_config, save_tokenizer

VOWELS = "aeiou"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Qwen2-shaped model, and its workload per pass."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    num_sequences: int
    """Sequences per pass."""
    length: int
    """Tokens per sequence."""
    num_texts: int
    """Prompts per pass of batch inference."""


SHAPES = {
    shape.name: shape
    for shape in (
        # So small that Python between engine and network is the limit, as beside a fast GPU.
        Shape(
            name="small",
            vocab_size=4096,
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            intermediate_size=768,
            num_sequences=32,
            length=512,
            num_texts=384,
        ),
        # The worst case for the output layer and for top-k.
        Shape(
            name="wide",
            vocab_size=151_936,
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            intermediate_size=768,
            num_sequences=8,
            length=256,
            num_texts=32,
        ),
        # Qwen2.5-0.5B: 358 million weights in the body, 136 million in the output layer.
        Shape(
            name="qwen",
            vocab_size=151_936,
            hidden_size=896,
            num_layers=24,
            num_heads=14,
            num_kv_heads=2,
            intermediate_size=4864,
            num_sequences=8,
            length=512,
            num_texts=32,
        ),
        # Qwen2.5-7B, for a GPU: 15 GB of weights.
        Shape(
            name="qwen7b",
            vocab_size=152_064,
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            intermediate_size=18_944,
            num_sequences=32,
            length=1024,
            num_texts=32,
        ),
    )
}
MAX_SEQUENCE_TOKENS = 2048


def make_teacher(shape: Shape, directory: Path) -> Path:
    """Writes a model in Hugging Face layout with random bfloat16 weights and the tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    make_tokenizer(directory, shape.vocab_size)
    config = model_config(
        AutoTokenizer.from_pretrained(directory),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=MAX_SEQUENCE_TOKENS,
        vocab_size=shape.vocab_size,
        # Wide enough that top-k tokens differ between positions.
        initializer_range=0.1 if shape.hidden_size < 512 else 0.02,
    )
    config.dtype = torch.bfloat16
    # Billions of weights are drawn on a GPU in seconds.
    with torch.random.fork_rng(), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory, safe_serialization=True)
    return directory


def make_tokenizer(directory: Path, vocab_size: int) -> Path:
    """Builds a byte-level BPE tokenizer of exactly `vocab_size` tokens: special tokens, bytes, then words of 2, 4 and
    6 letters.

    Words are made of syllables of a consonant and a vowel. Six letters are about the length of a token of Qwen2.5, so
    a server that detokenizes writes about as much text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: number for number, token in enumerate(names)}
    merges: list[tuple[str, str]] = []
    for left, right in itertools.islice(_merges(), vocab_size - len(vocab)):
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return save_tokenizer(tokenizer, directory)


def _merges() -> itertools.chain[tuple[str, str]]:
    """Merges of the BPE, the parts of a pair before the pair."""
    consonants = [letter for letter in string.ascii_lowercase if letter not in VOWELS]
    syllables = [consonant + vowel for consonant in consonants for vowel in VOWELS]
    return itertools.chain(
        itertools.product(consonants, VOWELS),
        itertools.product(syllables, syllables),
        ((left + middle, right) for left, middle, right in itertools.product(syllables, repeat=3)),
    )
