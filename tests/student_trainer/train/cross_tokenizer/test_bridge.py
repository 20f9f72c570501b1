"""Text in the tokens of a teacher with another tokenizer: both sides of every chunk are the same bytes; dropped tokens are counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.train.cross_tokenizer.bridge import Bridge
from stillhouse.student_trainer.train.cross_tokenizer.token_bytes import TokenBytes
from stillhouse.student_trainer.train.data.alignment import AlignedText, Tokens, align
from stillhouse.student_trainer.train.data.encoding import Example
from tests.support.small_models import make_tokenizer
from tests.support.texts import sentences

TEXTS = [*sentences(60, seed=3), "naïve café, 東京 🎉🎉 done", "  two  spaces\n\nand\tlines "]
ROLES = {"eos_token": "<|endoftext|>"}


def _byte_level(vocab_size: int, specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def _sentence_piece() -> Tokenizer:
    """Makes a Llama-2-like tokenizer: a sign for spaces, one in front of every text, and bytes for unknown characters."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *pieces],
        show_progress=False,
        limit_alphabet=40,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [each for each in document["added_tokens"] if each["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="module")
def student() -> Tokenizer:
    return _byte_level(330, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


@pytest.fixture(scope="module")
def teacher() -> Tokenizer:
    return _byte_level(500, ["<|end|>", "<|im_start|>"])


@pytest.fixture(scope="module")
def sentence_piece() -> Tokenizer:
    return _sentence_piece()


def _bridge(
    student: Tokenizer, teacher: Tokenizer, *, words: bool = False, ends: tuple[int, ...] = (0,)
) -> Bridge:
    return Bridge(student.to_str(), teacher.to_str(), student_roles=ROLES, teacher_end_ids=ends, words=words)


def _example(student: Tokenizer, prompt: str, completion: str, *, end: bool = True) -> Example:
    before = student.encode(prompt, add_special_tokens=False).ids
    after = student.encode(completion, add_special_tokens=False).ids
    end_id = student.token_to_id("<|endoftext|>")
    ids = [*before, *after, *([end_id] if end and end_id is not None else [])]
    return Example(
        token_ids=np.array(ids, np.int32),
        mask=np.arange(len(ids)) >= max(1, len(before)),
        place="row",
        num_prompt=max(1, len(before)),
    )


def _bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> bytes:
    table = TokenBytes(tokenizer.to_str(), "teacher")
    return b"".join(
        table.lookup(int(each)) or f"[{tokenizer.id_to_token(int(each))}]".encode() for each in ids
    )


def _chunk_bytes(
    example: Example, found: AlignedText, student: Tokenizer, teacher: Tokenizer
) -> list[tuple[bytes, bytes]]:
    return [
        (
            _bytes(student, example.token_ids[found.chunks.student == chunk]),
            _bytes(teacher, found.token_ids[found.chunks.teacher == chunk]),
        )
        for chunk in range(found.chunks.number)
    ]


@settings(deadline=None, max_examples=150)
@given(
    prompt=st.text(max_size=20),
    completion=st.one_of(st.text(min_size=1, max_size=40), st.sampled_from(TEXTS)),
    words=st.booleans(),
)
def test_both_sides_of_a_chunk_are_the_same_bytes(
    student: Tokenizer, teacher: Tokenizer, prompt: str, completion: str, words: bool
) -> None:
    example = _example(student, prompt, completion)
    bridge = _bridge(student, teacher, words=words)
    found = bridge.translate(example)
    if found is None:
        assert not prompt
        return
    chunks = _chunk_bytes(example, found, student, teacher)
    own = {"[<|endoftext|>]": "[<|end|>]"}
    for ours, theirs in chunks:
        assert own.get(ours.decode(errors="ignore"), ours.decode(errors="ignore")) == theirs.decode(
            errors="ignore"
        )
        assert ours in (theirs, b"[<|endoftext|>]")
    if prompt:  # otherwise the first token of either side is predicted from nothing
        assert bridge.stats.num_aligned == example.num_targets
        assert b"".join(theirs for _, theirs in chunks) == completion.encode() + b"[<|end|>]"
    assert found.start >= 1
    assert bridge.stats.num_inexact == 0


def test_one_tokenizer_on_both_sides_gives_a_chunk_for_each_token(student: Tokenizer) -> None:
    example = _example(student, "Question: ", TEXTS[0] + " 🎉 東京")
    bridge = _bridge(student, student)
    assert bridge.teacher_size == student.get_vocab_size()
    found = bridge.translate(example)
    assert found is not None
    np.testing.assert_array_equal(found.token_ids, example.token_ids)
    expected = np.where(example.mask, np.cumsum(example.mask) - 1, -1)
    np.testing.assert_array_equal(found.chunks.student, expected)
    np.testing.assert_array_equal(found.chunks.teacher, expected)
    assert found.start == example.start


def test_chunks_end_wherever_both_do_and_with_words_before_white_space_alone(
    student: Tokenizer, teacher: Tokenizer
) -> None:
    example = _example(student, "Say: ", TEXTS[1])
    shortest, words = (_bridge(student, teacher, words=each).translate(example) for each in (False, True))
    assert shortest is not None
    assert words is not None
    ends = [
        np.cumsum([len(_bytes(side, [each])) for each in ids])
        for side, ids in ((student, example.token_ids[:-1]), (teacher, shortest.token_ids[:-1]))
    ]
    both = set(ends[0].tolist()) & set(ends[1].tolist())
    assert shortest.chunks.number == len([each for each in both if each > len("Say: ")]) + 1
    assert words.chunks.number < shortest.chunks.number
    for _, theirs in _chunk_bytes(example, words, student, teacher)[1:-1]:
        assert theirs[:1].isspace()


def test_a_teacher_of_the_sentence_piece_kind_is_aligned_exactly(
    student: Tokenizer, sentence_piece: Tokenizer
) -> None:
    bridge = _bridge(student, sentence_piece, ends=(2,))
    example = _example(student, "Ask: 東京", " naïve answer 🎉")
    found = bridge.translate(example)
    assert found is not None
    assert found.token_ids[0] == sentence_piece.token_to_id("<s>")
    assert found.token_ids[-1] == sentence_piece.token_to_id("</s>")
    assert bridge.stats.num_inexact == 0
    assert bridge.stats.num_aligned == example.num_targets
    chunks = _chunk_bytes(example, found, student, sentence_piece)[:-1]
    assert b"".join(theirs for _, theirs in chunks).decode() == " naïve answer 🎉"
    assert all(ours == theirs for ours, theirs in chunks)


def test_a_student_of_the_sentence_piece_kind_reads_the_same_text(
    sentence_piece: Tokenizer, teacher: Tokenizer
) -> None:
    ids = sentence_piece.encode("Hello there 🎉 done").ids
    example = Example(token_ids=np.array([*ids, 2], np.int32), mask=np.arange(len(ids) + 1) > 3, place="row")
    bridge = Bridge(
        sentence_piece.to_str(),
        teacher.to_str(),
        student_roles={"eos_token": "</s>", "bos_token": "<s>"},
        teacher_end_ids=(0,),
    )
    found = bridge.translate(example)
    assert found is not None
    assert _bytes(teacher, found.token_ids) == "Hello there 🎉 done[<|end|>]".encode()
    assert bridge.stats.dropped_special_tokens == {"<s>": 1}


def test_a_normaliser_of_the_teacher_leaves_character_offsets(student: Tokenizer) -> None:
    lower = _byte_level(400, ["<|end|>"])
    lower.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    bridge = _bridge(student, lower)
    example = _example(student, "Was: ", "Ein Café GRÜSST 東京")
    found = bridge.translate(example)
    assert found is not None
    assert bridge.stats.num_inexact == 1
    assert bridge.stats.num_aligned == example.num_targets
    assert found.chunks.number >= 4


def test_special_tokens_are_not_text_and_text_that_spells_one_stays_text(
    student: Tokenizer, teacher: Tokenizer
) -> None:
    """Teacher and student share <|im_start|>; <|im_end|> is only the student's, <|end|> only the teacher's."""
    bridge = _bridge(student, teacher)
    start, stop = student.token_to_id("<|im_start|>"), student.token_to_id("<|im_end|>")
    written = student.encode("say <|end|> now", add_special_tokens=False).ids
    ids = [start, *student.encode("user\nHi").ids, stop, start, *written, stop]
    mask = np.arange(len(ids)) > len(ids) - len(written) - 2
    example = Example(token_ids=np.array(ids, np.int32), mask=mask, place="row")
    found = bridge.translate(example)
    assert found is not None
    assert bridge.stats.dropped_special_tokens == {"<|im_end|>": 2}
    assert (found.token_ids == teacher.token_to_id("<|im_start|>")).sum() == 2
    assert teacher.token_to_id("<|end|>") not in found.token_ids
    assert bridge.stats.num_aligned == example.num_targets - 1
    assert found.chunks.student[-1] == -1


def test_a_token_that_ends_turns_of_the_student_becomes_the_teachers_end(
    student: Tokenizer, teacher: Tokenizer
) -> None:
    stop = student.token_to_id("<|im_end|>")
    assert stop is not None
    ids = [*student.encode("hi", add_special_tokens=False).ids, stop]
    example = Example(
        token_ids=np.array(ids, np.int32), mask=np.arange(len(ids)) >= 1, place="row", num_prompt=1
    )
    bridge = Bridge(
        student.to_str(), teacher.to_str(), student_roles=ROLES, teacher_end_ids=(0,), student_end_ids=(stop,)
    )
    found = bridge.translate(example)
    assert found is not None
    assert _bytes(teacher, found.token_ids) == b"hi[<|end|>]"
    assert bridge.stats.dropped_special_tokens == {}


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_ids_are_safe(student: Tokenizer, teacher: Tokenizer, data: Any) -> None:
    """Bytes that are not text, ids beyond the vocabulary, rows truncated inside a character."""
    ids = data.draw(st.lists(st.integers(0, 400), min_size=2, max_size=40))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    mask[0] = False
    mask[-1] = True
    example = Example(token_ids=np.array(ids, np.int32), mask=mask, place="row")
    found = _bridge(student, teacher).translate(example)
    if found is None:
        return
    assert not found.chunks.teacher[0] >= 0
    used = found.chunks.student[found.chunks.student >= 0]
    assert mask[found.chunks.student >= 0].all()
    assert sorted(set(used.tolist())) == list(range(found.chunks.number))
    for ours, theirs in _chunk_bytes(example, found, student, teacher):
        assert ours in (theirs, b"[<|endoftext|>]")


def test_a_row_cut_inside_a_character_keeps_its_complete_ones(student: Tokenizer, teacher: Tokenizer) -> None:
    example = _example(student, "a: ", "well 🎉", end=False)
    cut = Example(token_ids=example.token_ids[:-1], mask=example.mask[:-1], place="row")
    found = _bridge(student, teacher).translate(cut)
    assert found is not None
    assert _bytes(teacher, found.token_ids) == b"a: well "
    assert (found.chunks.student >= 0).sum() < cut.num_targets


def test_other_tokenizers_than_byte_level_and_sentence_piece_are_refused(student: Tokenizer) -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for pair in ((student, words), (words, student)):
        with pytest.raises(StillhouseError) as caught:
            _bridge(*pair)
        assert caught.value.reason is Reason.TOKENIZER_INVALID
        assert "byte by byte" in caught.value.message


@pytest.mark.parametrize("content", [b"", b"[]", b'{"model": {"vocab": 3}}', b"[" * 100_000, b"\xff"])
def test_a_hostile_tokenizer_is_refused(student: Tokenizer, content: bytes) -> None:
    with pytest.raises(StillhouseError) as caught:
        Bridge(student.to_str(), content, student_roles={}, teacher_end_ids=())
    assert caught.value.reason is Reason.TOKENIZER_INVALID


def test_the_sum_of_a_chunk_is_that_of_its_tokens() -> None:
    def tokens(ends: list[int], counts: Callable[[np.ndarray], np.ndarray]) -> Tokens:
        return Tokens(ends=np.array(ends, np.int64), counts=counts(np.arange(len(ends))))

    chunks = align(
        tokens([2, 4, 6, 8], lambda at: at > 0),
        tokens([2, 3, 4, 8], lambda at: at > 0),
        missing=np.zeros(8, np.bool_),
        cuts=np.array([0, 8]),
    )
    np.testing.assert_array_equal(chunks.student, [-1, 0, 1, 1])
    np.testing.assert_array_equal(chunks.teacher, [-1, 0, 0, 1])
    foreign = AlignedText(token_ids=np.zeros(4, np.int32), chunks=chunks)
    assert foreign.start == 1
    np.testing.assert_allclose(foreign.logprobs(np.array([-1, -2, -4], np.float32)), [-3, -4])


def test_a_tokenizer_of_the_examples_is_known(tmp_path: Path) -> None:
    directory = make_tokenizer(TEXTS, tmp_path, 300)
    table = TokenBytes((directory / "tokenizer.json").read_bytes(), "student")
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXTS[-2]).ids
    assert b"".join(table.lookup(each) or b"" for each in ids).decode() == TEXTS[-2]
