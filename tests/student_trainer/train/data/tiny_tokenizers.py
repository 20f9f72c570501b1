"""Fast tokenizers of a few hundred tokens, by structure: byte-level, and SentencePiece as Metaspace or as normalizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

TEXTS = (
    "The capital of France is Paris, and that of Italy is Rome.",
    "Ada has 3 apples. Ben has 4 boats. Hi, are you sure? Yes, I am.",
    "user assistant system tool model think",
)
Space = Literal["metaspace_always", "metaspace_first", "normalizer"]


def byte_level(
    marks: Sequence[str] = (), *, eos: str = "</s>", bos: str | None = None, adds_bos: bool = False
) -> Any:
    """Makes a byte-level BPE tokenizer; `marks` are special tokens without a role, as Gemma 3's turn marks are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*([bos] if bos else []), eos, *marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _fast(tokenizer, bos, eos, adds_bos=adds_bos)


def sentence_piece(space: Space, marks: Sequence[str] = (), *, adds_bos: bool = True) -> Any:
    """Makes a BPE tokenizer with byte fallback that puts a space before a text, as Llama 2 and Mistral have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=first, show_progress=False)
    )
    import json

    model = json.loads(learnt.to_str())["model"]
    merges = [tuple(each) for each in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    strip = []
    if space == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.Prepend("\N{LOWER ONE EIGHTH BLOCK}"),
                normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}"),
            ]
        )
        strip = [decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=space.removeprefix("metaspace_"), split=False
        )
        strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *strip,
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(each, special=True, normalized=False) for each in ("<s>", "</s>", *marks)]
    )
    return _fast(tokenizer, "<s>", "</s>", adds_bos=adds_bos)


def _fast(tokenizer: Any, bos: str | None, eos: str, *, adds_bos: bool) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if adds_bos:
        assert bos is not None
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
