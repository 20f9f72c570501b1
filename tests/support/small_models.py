"""Makes small Hugging Face models from nothing: tokenizers, Qwen2-shaped weights, BERTs, LoRA adapter; a seed fixes every number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

END, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END, PAD, TURN_START, TURN_END)
TINY_SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
"""Settings of the configuration of a model for transformers alone."""
BERT_PAD, UNKNOWN, BEGIN, SEPARATOR, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(
    texts: Iterable[str], directory: Path, vocab_size: int, *, full_alphabet: bool = True
) -> Path:
    """Directory with a byte-level BPE tokenizer learnt from `texts`, of at most `vocab_size` tokens.

    Without `full_alphabet` only the bytes of `texts` become tokens, so that a vocabulary may be smaller than 260;
    other bytes are then dropped.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if full_alphabet else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return save_tokenizer(tokenizer, directory)


def save_tokenizer(tokenizer: Any, directory: Path) -> Path:
    """Directory with a Tokenizer of the tokenizers library, which has SPECIAL_TOKENS, and a chat template."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory


def make_model(
    directory: Path,
    *,
    tokenizer_dir: Path,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int | None = None,
    max_sequence_tokens: int = 512,
    seed: int = 0,
    vocab_padding: int = 0,
    initializer_range: float = 0.02,
) -> Path:
    """Directory with a Qwen2-shaped model of random float32 weights and a copy of the tokenizer.

    `vocab_padding` rows are added to the output layer beyond the tokenizer's size. `intermediate_size` is
    three times `hidden_size` if it is not given. Raises `ValueError` unless a head is 32 or 64 wide, the narrow
    widths that vLLM's attention on a CPU takes.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    if hidden_size % num_heads or hidden_size // num_heads not in (32, 64):
        raise ValueError(
            f"hidden_size {hidden_size} with {num_heads} heads gives heads of {hidden_size / num_heads:g}; "
            "choose them so that a head is 32 or 64 wide."
        )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(
            model_config(
                tokenizer,
                hidden_size=hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                num_key_value_heads=num_heads,
                intermediate_size=intermediate_size or 3 * hidden_size,
                max_position_embeddings=max_sequence_tokens,
                vocab_size=len(tokenizer) + vocab_padding,
                initializer_range=initializer_range,
            )
        )
    save_model(model, tokenizer, directory)
    return directory


def model_config(tokenizer: Any, **sizes: Any) -> Any:
    """A `Qwen2Config` of the given sizes that ends and pads as `tokenizer` does, with one embedding for both ends."""
    from transformers import Qwen2Config

    return Qwen2Config(
        **sizes,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes weights as safetensors and the tokenizer beside them."""
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)


def make_adapter(
    directory: Path, base_dir: Path, rank: int, seed: int, modules: Sequence[str] = ("q_proj", "v_proj")
) -> Path:
    """Directory with a LoRA adapter of `base_dir` on these modules, both of its matrices random and not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    adapted.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    return directory


def make_student(
    teacher_dir: Path,
    directory: Path,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    seed: int,
    tokenizer_dir: Path | None = None,
) -> Path:
    """Directory with a student of random weights with the teacher's sequence length and, unless given, its tokenizer."""
    from transformers import AutoConfig

    teacher = AutoConfig.from_pretrained(teacher_dir)
    return make_model(
        directory,
        tokenizer_dir=tokenizer_dir or teacher_dir,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        max_sequence_tokens=teacher.max_position_embeddings,
        seed=seed,
    )


def make_wordpiece(texts: Iterable[str], directory: Path, vocab_size: int, *, max_tokens: int = 128) -> Path:
    """Directory with a WordPiece tokenizer learnt from `texts`, which marks the second text of a pair by its type."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[BERT_PAD, UNKNOWN, BEGIN, SEPARATOR, MASK],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {SEPARATOR}",
        pair=f"{BEGIN} $A {SEPARATOR} $B:1 {SEPARATOR}:1",
        special_tokens=[(each, tokenizer.token_to_id(each)) for each in (BEGIN, SEPARATOR)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=BERT_PAD,
        unk_token=UNKNOWN,
        cls_token=BEGIN,
        sep_token=SEPARATOR,
        mask_token=MASK,
        model_max_length=max_tokens,
    )
    fast.save_pretrained(directory)
    return directory


def make_encoder(
    directory: Path,
    *,
    tokenizer_dir: Path,
    class_names: Sequence[str] = (),
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    seed: int = 0,
    initializer_range: float = 0.02,
) -> Path:
    """Directory with a BERT of random float32 weights, with a head over `class_names` if there are any."""
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = encoder_config(
        tokenizer,
        class_names,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=2 * hidden_size,
        initializer_range=initializer_range,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = BertForSequenceClassification(config) if class_names else BertModel(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def encoder_config(tokenizer: Any, class_names: Sequence[str] = (), **sizes: Any) -> Any:
    """A `BertConfig` without dropout for the tokenizer's texts."""
    from transformers import BertConfig

    labels: dict[str, Any] = {}
    if class_names:
        labels["id2label"] = dict(enumerate(class_names))
        labels["label2id"] = {name: number for number, name in enumerate(class_names)}
    return BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **sizes,
        **labels,
    )


@click.command()
@click.option(
    "--like",
    "teacher_dir",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Directory of the teacher, whose tokenizer the student takes.",
)
@click.option(
    "--out", "directory", type=click.Path(path_type=Path), required=True, help="Directory to write."
)
@click.option("--hidden-size", type=int, default=128, show_default=True)
@click.option("--layers", "num_layers", type=int, default=2, show_default=True)
@click.option("--heads", "num_heads", type=int, default=None, help="Default: heads of 32.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--tokenizer-from",
    "text_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text to learn a tokenizer of its own from, for a student that is foreign to its teacher.",
)
@click.option(
    "--vocab-size", type=click.IntRange(min=260), default=512, show_default=True, help="Of that tokenizer."
)
def main(
    *,
    teacher_dir: Path,
    directory: Path,
    hidden_size: int,
    num_layers: int,
    num_heads: int | None,
    seed: int,
    text_file: Path | None,
    vocab_size: int,
) -> None:
    """Write a student with random weights and a teacher's tokenizer, or one of its own."""
    tokenizer_dir = None
    if text_file is not None:
        with text_file.open(encoding="utf-8") as lines:
            tokenizer_dir = make_tokenizer(lines, directory, vocab_size)
    try:
        make_student(
            teacher_dir,
            directory,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads or max(1, hidden_size // 32),
            seed=seed,
            tokenizer_dir=tokenizer_dir,
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"wrote {directory}")


if __name__ == "__main__":
    main()
