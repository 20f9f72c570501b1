"""Texts that come in pieces, and the distinct draws of a service's stratified ones."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoResponse, SampleChunk
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions, encode, encode_distributions
from stillhouse.student_trainer.train.rollouts.local_sampler import PART_TOKENS
from stillhouse.student_trainer.train.rollouts.token_sampler import POINTS_PER_DRAW
from stillhouse.student_trainer.train.rollouts.written_text import PieceReader, WrittenText, distinct_draws

VOCAB, DRAWS, END, MAX_TOKENS = 50, 8, 3, 3 * PART_TOKENS


def _rows(token_ids: list[int], probs: np.ndarray[Any, Any], start: int, place: float = 0.5) -> Distributions:
    """Rows of one distribution whose likeliest id is 0, with systematic draws from the others."""
    tail = probs[1:]
    points = (np.arange(DRAWS) + place) / DRAWS * tail.sum()
    ids = np.searchsorted(tail.cumsum(), points, side="right") + 1
    count = len(token_ids)
    return Distributions(
        start=start,
        token_ids=np.zeros((count, 1), np.int32),
        logprobs=np.log(probs[:1], dtype=np.float32)[None].repeat(count, 0),
        target_logprobs=np.log(probs[token_ids]).astype(np.float32),
        log_tail=np.full(count, np.log(tail.sum()), np.float32),
        sampled_token_ids=ids.astype(np.int32)[None].repeat(count, 0),
        sampled_logprobs=np.log(probs[ids]).astype(np.float32)[None].repeat(count, 0),
    )


def _probs(head: float) -> np.ndarray[Any, Any]:
    """`head` on id 0, and falling shares of the rest: some ids have far more than a point's distance, most far less."""
    falling = 1.0 / np.arange(1, VOCAB) ** 1.5
    return np.concatenate([[head], (1 - head) * falling / falling.sum()])


@pytest.mark.parametrize("head", [0.3, 0.8, 0.97], ids=["flat", "sharp", "sharper"])
def test_distinct_draws_estimate_sums_over_the_tail_without_bias(head: float) -> None:
    probs, generator = _probs(head), np.random.default_rng(0)
    values = np.sin(np.arange(VOCAB))
    estimates, widths = [], []
    for place in (np.arange(4000) + 0.5) / 4000:
        draws, logprobs = distinct_draws(_rows([5], probs, 1, float(place)), generator)
        kept = draws[0][draws[0] >= 0]
        assert len(set(kept.tolist())) == len(kept)
        # The loss gives each of R columns the share 1 / R.
        weights = probs[kept] / np.exp(logprobs[0][draws[0] >= 0].astype(np.float64)) / DRAWS
        estimates.append(float((weights * values[kept]).sum()))
        widths.append(len(kept))
    exact = float((probs[1:] * values[1:]).sum())
    error = np.std(estimates) / len(estimates) ** 0.5
    assert np.mean(estimates) == pytest.approx(exact, abs=5 * error + 1e-6)
    # Points on the whole line are bounded, so a small tail has few of them.
    assert max(widths) <= max(1, np.ceil(min(1.0, 2 * POINTS_PER_DRAW * (1 - head)) * DRAWS))


def test_an_empty_tail_has_no_draws() -> None:
    rows = _rows([5, 6], _probs(0.5), 1)
    rows.log_tail[0] = -np.inf
    draws, _ = distinct_draws(rows, np.random.default_rng(0))
    assert (draws[0] == -1).all()
    assert (draws[1] >= 0).any()


def _chunk(token_ids: list[int], start: int, finish: Any = 0, *, fingerprint: str = "") -> SampleChunk:
    rows = _rows(token_ids, _probs(0.4), start)
    return SampleChunk(
        token_ids=encode(np.array(token_ids, np.int32)),
        sampling_logprobs=encode(rows.target_logprobs),
        distributions=encode_distributions(rows, logprob_dtype=Tensor.DATA_TYPE_FLOAT32, sort_bits=6),
        finish_reason=finish,
        adapter_fingerprint=fingerprint,
    )


def _text() -> WrittenText:
    reader = PieceReader(
        target="nowhere",
        info=GetTeacherInfoResponse(vocab_size=VOCAB),
        vocab_size=VOCAB - 1,
        num_likeliest=1,
        end_ids=[END],
    )
    return WrittenText(reader, seed=1, sample=0, num_draws=DRAWS, max_new_tokens=MAX_TOKENS)


def test_a_text_in_pieces_is_that_of_one_piece() -> None:
    token_ids = [5 + number % 40 for number in range(2 * PART_TOKENS + 9)]
    pieces, whole = _text(), _text()
    cuts = [0, PART_TOKENS + 1, 2 * PART_TOKENS + 1, len(token_ids)]
    parts = []
    for first, end in itertools.pairwise(cuts):
        finish = SampleChunk.FINISH_REASON_LENGTH if end == len(token_ids) else 0
        pieces.add(_chunk(token_ids[first:end], 10 + first, finish))
        if pieces.has_part:
            parts.append(pieces.text())
    whole.add(_chunk(token_ids, 10, SampleChunk.FINISH_REASON_LENGTH))
    one, other = pieces.text(), whole.text()
    assert one.token_ids.tolist() == other.token_ids.tolist() == token_ids
    assert one.draws.tolist() == other.draws.tolist()
    np.testing.assert_array_equal(one.draw_logprobs, other.draw_logprobs)
    assert [len(part.token_ids) for part in parts] == cuts[1:3]
    for part in parts:
        width = part.draws.shape[1]
        assert part.draws.tolist() == one.draws[: len(part.token_ids), :width].tolist()
    assert not one.finished


def test_an_end_that_the_service_does_not_know_ends_a_text() -> None:
    text = _text()
    text.add(_chunk([5, 6, END, 7, 8], 10))
    assert not text.has_part
    text.add(_chunk([9] * PART_TOKENS, 15, SampleChunk.FINISH_REASON_LENGTH))
    found = text.text()
    assert found.token_ids.tolist() == [5, 6, END]
    assert len(found.draws) == len(found.draw_logprobs) == len(found.likeliest) == 3
    assert found.finished


def test_an_empty_last_piece_ends_a_text() -> None:
    text = _text()
    text.add(_chunk([5, 6], 10))
    text.add(
        SampleChunk(token_ids=encode(np.zeros(0, np.int32)), finish_reason=SampleChunk.FINISH_REASON_STOP)
    )
    assert text.text().token_ids.tolist() == [5, 6]
    assert text.text().finished


def test_a_text_without_tokens_is_refused() -> None:
    text = _text()
    text.add(
        SampleChunk(token_ids=encode(np.zeros(0, np.int32)), finish_reason=SampleChunk.FINISH_REASON_STOP)
    )
    with pytest.raises(StillhouseError, match="without tokens"):
        text.text()


@pytest.mark.parametrize(
    ("token_ids", "is_ended"),
    [([5] * PART_TOKENS, False), ([], False), ([5, END], True)],
    ids=["tokens", "none", "behind the end"],
)
def test_a_text_that_never_ends_is_refused(token_ids: list[int], is_ended: bool) -> None:
    text, piece = _text(), SampleChunk(token_ids=encode(np.zeros(0, np.int32)))
    if token_ids:
        piece = _chunk(token_ids, 10)

    def add_endlessly() -> None:
        for _ in range(2 * MAX_TOKENS):
            text.add(piece)

    with pytest.raises(StillhouseError, match=f"of one text; at most {MAX_TOKENS} were asked for"):
        add_endlessly()
    assert text._has_ended == is_ended
