"""A tiny model with set weights that answers every conversation with one text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from tests.support.small_models import model_config, save_model

WIDTH = 128
CERTAINTY = 4.0
"""Scale of the output layer: each token is followed by the next one of the text, also in a draw."""


def make_speaker(directory: Path, pieces: Sequence[str], *, tokenizer_dir: Path, chat_template: str) -> Path:
    """Directory with a model that writes `pieces`, which differ, each a token, and then ends.

    `chat_template` ends with a line break where the answer begins.
    """
    import torch
    from tokenizers import AddedToken
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_tokens([AddedToken(each, normalized=False, special=False) for each in pieces])
    tokenizer.chat_template = chat_template
    config = model_config(
        tokenizer,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=WIDTH,
        max_position_embeddings=1024,
        vocab_size=len(tokenizer),
    )
    config.tie_word_embeddings = False
    [line_break] = tokenizer.encode("\n", add_special_tokens=False)
    chain = [line_break, *tokenizer.convert_tokens_to_ids(list(pieces)), tokenizer.eos_token_id]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        for layer in model.model.layers:  # the stream stays the token's own embedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        rows = torch.nn.functional.normalize(torch.randn(len(tokenizer), WIDTH), dim=1)
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight.zero_()
        for token, following in itertools.pairwise(chain):
            model.lm_head.weight[following] = CERTAINTY * rows[token]
    save_model(model, tokenizer, directory)
    return directory
