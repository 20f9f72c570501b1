"""Parsing of tokenizer.json: the byte alphabet, and the bytes of tokens as the tokenizers library decodes them."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson, byte_alphabet, tokenizer_errors


def test_every_byte_has_one_character_and_comes_back() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    assert TokenizerJson(tokenizer.to_str()).vocab_bytes() == {byte: bytes([byte]) for byte in range(256)}
    text = "Zwölf Boxkämpfer, 日本語 \x00\n"
    assert tokenizer.decode(list(text.encode())) == text


def test_a_byte_token_of_sentencepiece_comes_back_for_every_byte() -> None:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\N{LOWER ONE EIGHTH BLOCK}a": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    found = TokenizerJson(tokenizer.to_str()).vocab_bytes()
    assert found == {byte: bytes([byte]) for byte in range(256)} | {256: b" a"}


def test_unigram_vocabularies_have_ids_by_index_and_an_unknown_id() -> None:
    parsed = TokenizerJson(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)).to_str())
    assert parsed.is_unigram
    assert (parsed.tokens, parsed.unknown_id, parsed.merges) == ({0: "<unk>", 1: "a"}, 0, [])


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"model": null}', b'{"model": {"vocab": [[]]}}', b"[" * 10**6]
)
def test_a_malformed_file_is_an_error_with_its_remedy(data: bytes) -> None:
    with pytest.raises(StillhouseError, match=r"cannot be read \(\w+: .*\). Use another.") as caught:  # noqa: SIM117
        with tokenizer_errors("It cannot be read", "Use another."):
            TokenizerJson(data)
    assert caught.value.reason is Reason.TOKENIZER_INVALID
