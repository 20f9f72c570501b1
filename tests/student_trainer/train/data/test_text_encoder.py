"""Prompt and completion meet as a prompt and its generated text: no space is gained, and prompts stay as at inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from stillhouse.student_trainer.train.data.encoding import RowEncoder
from stillhouse.student_trainer.train.data.readers import DatasetRow
from stillhouse.teacher_service.models.tokenizer import TextCodec
from tests.student_trainer.train.data.tiny_tokenizers import Space, byte_level, sentence_piece

TOKENIZERS = (*get_args(Space), "byte_level")
PAIRS = (
    ("The capital of France is", " Paris."),
    ("The capital of France is ", "Paris."),
    ("Ada h", "as 3 apples"),
    ("Hi", "\n\nYes"),
    ("Hi é", "é, I am"),
)


def _make(name: Any) -> Any:
    return byte_level() if name == "byte_level" else sentence_piece(name)


def _encode(tokenizer: Any, *, ends_text: bool = True, **values: Any) -> tuple[list[int], list[bool]]:
    encoder = RowEncoder(tokenizer, completion_only=True, ends_text=ends_text)
    return encoder.encode(DatasetRow(path=Path("rows.jsonl"), number=1, values=values))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_generated_row_comes_back_as_the_ids_that_were_generated(name: str) -> None:
    tokenizer = _make(name)
    codec = TextCodec(tokenizer, Path())
    for prompt, completion in PAIRS:
        asked = codec.encode(prompt).tolist()
        # Text that is generated begins with no space unless the model writes one.
        generated = tokenizer.encode(f".{completion}", add_special_tokens=False)
        generated = generated[len(tokenizer.encode(".", add_special_tokens=False)) :]
        text = codec.stream_decoder(context=asked).push(generated, final=True).text
        assert text == completion
        token_ids, mask = _encode(tokenizer, prompt=prompt, completion=text, finish_reason="stop")
        assert token_ids == [*asked, *generated, tokenizer.eos_token_id], (prompt, completion)
        assert mask == [False] * len(asked) + [True] * (len(generated) + 1)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_truncated_row_teaches_no_end(name: str) -> None:
    tokenizer = _make(name)
    whole, _ = _encode(tokenizer, prompt="Ada has", completion=" 3 apples")
    for reason in ("length", "max_tokens", "LENGTH", "FINISH_REASON_MAX_TOKENS"):
        cut, mask = _encode(tokenizer, prompt="Ada has", completion=" 3 apples", finish_reason=reason)
        assert [*cut, tokenizer.eos_token_id] == whole
        assert mask[-1]
    for ended in ("stop", "", None):
        assert _encode(tokenizer, prompt="Ada has", completion=" 3 apples", finish_reason=ended)[0] == whole


def test_plain_text_ends_unless_the_run_says_otherwise() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("Ada has 3 apples.")
    assert _encode(tokenizer, text="Ada has 3 apples.")[0] == [*ids, tokenizer.eos_token_id]
    assert _encode(tokenizer, text="Ada has 3 apples.", ends_text=False)[0] == ids
    assert _encode(tokenizer, text="Ada has 3 apples.", finish_reason="length")[0] == ids


def test_text_that_has_its_end_gets_no_other() -> None:
    tokenizer = byte_level(["<|im_end|>"])
    for end in ("</s>", "<|im_end|>", "<|im_end|>\n"):
        encoder = RowEncoder(tokenizer, completion_only=True)
        row = DatasetRow(path=Path("a"), number=1, values={"prompt": "Hi", "completion": f" Yes{end}"})
        assert tokenizer.decode(encoder.encode(row)[0]) == f"Hi Yes{end.strip()}"
        assert encoder.end_ids == (tokenizer.convert_tokens_to_ids(end.strip()),)


def test_a_doubled_beginning_is_noticed_and_dropped() -> None:
    tokenizer = sentence_piece("metaspace_first")
    encoder = RowEncoder(tokenizer, completion_only=True)
    rows = [{"text": "<s>Ada has"}, {"prompt": "<s>Ada", "completion": " has"}, {"text": "Ada"}]
    texts = [encoder.encode(DatasetRow(path=Path("a"), number=1, values=each))[0] for each in rows]
    assert texts[0] == texts[1]
    assert [text.count(tokenizer.bos_token_id) for text in texts] == [1, 1, 1]
    assert encoder.notes == {"doubled_openings": 2}
    assert TextCodec(tokenizer, Path()).encode("<s>Ada has").tolist() == texts[0][:-1]


def test_a_tokenizer_that_ends_every_text_ends_no_prompt() -> None:
    from tokenizers import processors

    tokenizer = byte_level()
    ends_all = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = ends_all
    bare = tokenizer.encode("Ada has", add_special_tokens=False)
    assert tokenizer.encode("Ada has") == [*bare, tokenizer.eos_token_id]
    assert TextCodec(tokenizer, Path()).encode("Ada has").tolist() == bare
    assert _encode(tokenizer, text="Ada has")[0] == [*bare, tokenizer.eos_token_id]
    assert _encode(tokenizer, prompt="Ada has", completion=" 3")[0][: len(bare)] == bare
