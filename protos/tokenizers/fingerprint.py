"""The fingerprint of a tokenizer, which both sides compute alike: what decides which text an id stands for, and nothing else."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson, tokenizer_errors

# Options of a segmentation model that mean the same whether they are false, empty or missing.
_MODEL_TABLES = ("vocab", "merges")


def tokenizer_fingerprint(tokenizer_json: str | bytes, special_tokens: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, over (id, token) pairs, merges, normaliser, pre-tokeniser and special tokens.

    `tokenizer_json` is what `tokenizer.backend_tokenizer.to_str()` gives: the tokenizer as it was
    loaded, which may differ from the file that it was loaded from. `special_tokens` maps roles such as
    "eos_token" to tokens, as transformers' `special_tokens_map` does; values may be strings, objects with
    `content`, or lists of either. Padding and truncation, the pad token (which never stands for text), the
    post-processor, the decoder and the chat template do not matter.

    Raises StillhouseError(TOKENIZER_INVALID) for anything but a tokenizer of the `tokenizers` library.
    """
    with tokenizer_errors(
        "The tokenizer's description cannot be read",
        "Use a model with a tokenizer.json of the tokenizers library.",
    ):
        tokenizer = TokenizerJson(tokenizer_json)
        canonical = {
            "tokens": _tokens(tokenizer),
            "model": _model(tokenizer),
            "normalizer": tokenizer.document.get("normalizer"),
            "pre_tokenizer": tokenizer.document.get("pre_tokenizer"),
            "special_tokens": _special_tokens(special_tokens),
        }
        text = json.dumps(
            canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        )
    return hashlib.sha256(text.encode()).hexdigest()


def _tokens(tokenizer: TokenizerJson) -> list[list[Any]]:
    """Every (id, token, matching flags of an added token), ordered."""
    added = {(each.id, each.content): list(each.flags) for each in tokenizer.added}
    return [[index, token, added.get((index, token))] for index, token in sorted({*tokenizer.vocab, *added})]


def _model(tokenizer: TokenizerJson) -> dict[str, Any]:
    """The segmentation model: merges or scores, and the options that are set."""
    options = {key: value for key, value in tokenizer.model.items() if key not in _MODEL_TABLES and value}
    scores = [float(entry[1]) for entry in tokenizer.model["vocab"]] if tokenizer.is_unigram else None
    return {"options": options, "merges": tokenizer.merges, "scores": scores}


def _special_tokens(special_tokens: Mapping[str, Any]) -> dict[str, list[str]]:
    """Role to tokens. The lists of further special tokens have no roles, and older names for the same list."""
    roles: dict[str, list[str]] = {}
    for role, value in special_tokens.items():
        if role == "pad_token" or not value:
            continue
        tokens = [_content(each) for each in value] if isinstance(value, (list, tuple)) else [_content(value)]
        if role in {"additional_special_tokens", "extra_special_tokens"}:
            continue  # they stand among the added tokens, with their ids
        roles[role] = tokens
    return roles


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(getattr(token, "content", token))
