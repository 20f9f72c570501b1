"""Tokenizer fingerprint: depends on the text of each id, and on nothing else."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint

VOCAB = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
MERGES = [("a", "b"), ("b", "c")]
SPECIAL = {"eos_token": "<e>", "pad_token": "<p>"}


def make(vocab: dict[str, int] = VOCAB, merges: list[tuple[str, str]] = MERGES) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<e>", "<p>"])
    return tokenizer


def fingerprint(tokenizer: Tokenizer, special: dict[str, Any] = SPECIAL) -> str:
    return tokenizer_fingerprint(tokenizer.to_str(), special)


BASE = fingerprint(make())
Change = Callable[[Tokenizer], object]


def test_it_is_a_sha256_that_stays_the_same() -> None:
    assert fingerprint(make()) == BASE
    assert BASE == "22eaa676e92a31aae8d3924fa604dc01ba5d5962d9d9b36bc77dd4a6cba9f2ed"


WITHOUT_MEANING: dict[str, Change] = {
    "truncation": lambda tokenizer: tokenizer.enable_truncation(8),
    "padding": lambda tokenizer: tokenizer.enable_padding(pad_id=6, pad_token="<p>"),
    "decoder": lambda tokenizer: setattr(tokenizer, "decoder", decoders.Fuse()),
    "post-processor": lambda tokenizer: setattr(
        tokenizer, "post_processor", processors.ByteLevel(trim_offsets=True)
    ),
}


@pytest.mark.parametrize("what", WITHOUT_MEANING)
def test_parts_that_affect_no_id_do_not_matter(what: str) -> None:
    tokenizer = make()
    WITHOUT_MEANING[what](tokenizer)
    assert fingerprint(tokenizer) == BASE


WITH_MEANING: dict[str, Change] = {
    "normaliser": lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Lowercase()),
    "pre-tokeniser": lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Whitespace()),
    "pre-tokeniser's option": lambda tokenizer: setattr(
        tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "added token": lambda tokenizer: tokenizer.add_tokens(["new"]),
    "special token": lambda tokenizer: tokenizer.add_special_tokens(["<new>"]),
    "how an added token matches": lambda tokenizer: tokenizer.add_special_tokens(
        [AddedToken("<e>", lstrip=True)]
    ),
    "dropout": lambda tokenizer: setattr(tokenizer.model, "dropout", 0.5),
}


@pytest.mark.parametrize("what", WITH_MEANING)
def test_parts_that_affect_ids_matter(what: str) -> None:
    tokenizer = make()
    WITH_MEANING[what](tokenizer)
    assert fingerprint(tokenizer) != BASE


def test_ids_tokens_and_merges_matter() -> None:
    assert fingerprint(make(vocab=VOCAB | {"a": 1, "b": 0})) != BASE
    assert fingerprint(make(vocab=VOCAB | {"d": 5})) != BASE
    assert fingerprint(make(merges=MERGES[::-1])) != BASE
    assert fingerprint(make(merges=MERGES[:1])) != BASE


def test_another_serialization_of_the_same_tokenizer_is_the_same() -> None:
    plain = json.loads(make().to_str())
    older = copy.deepcopy(plain)
    older["model"]["merges"] = [" ".join(merge) for merge in plain["model"]["merges"]]
    older["model"]["vocab"] = dict(reversed(plain["model"]["vocab"].items()))
    del older["model"]["ignore_merges"]
    older["model"]["continuing_subword_prefix"] = ""
    older["added_tokens"].reverse()
    assert tokenizer_fingerprint(json.dumps(older, indent=2), SPECIAL) == BASE
    assert tokenizer_fingerprint(json.dumps(older).encode(), SPECIAL) == BASE


def test_roles_of_special_tokens_matter_and_their_spelling_does_not() -> None:
    assert fingerprint(make(), {"eos_token": "<p>"}) != BASE
    assert fingerprint(make(), {"eos_token": "<e>", "bos_token": "<e>"}) != BASE
    assert fingerprint(make(), {"eos_token": {"content": "<e>", "lstrip": False}, "bos_token": None}) == BASE
    assert fingerprint(make(), {"eos_token": AddedToken("<e>"), "additional_special_tokens": ["<p>"]}) == BASE


def test_the_pad_token_never_stands_for_text() -> None:
    assert fingerprint(make(), {"eos_token": "<e>"}) == BASE
    assert fingerprint(make(), {"eos_token": "<e>", "pad_token": "<e>"}) == BASE


def test_scores_of_a_unigram_model_matter() -> None:
    one, same, other = (
        tokenizer_fingerprint(Tokenizer(models.Unigram([("<u>", 0.0), ("a", score)], 0, False)).to_str(), {})
        for score in (-1.0, -1.0, -2.0)
    )
    assert one == same != other


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"model": {"vocab": 5}}', "{" * 10_000, b"\xff", '{"model": {}}']
)
def test_malformed_tokenizers_are_refused(text: str | bytes) -> None:
    with pytest.raises(StillhouseError, match="cannot be read") as caught:
        tokenizer_fingerprint(text, {})
    assert caught.value.reason == Reason.TOKENIZER_INVALID
