"""Sampling of single tokens: top-k and top-p keep exactly their sets, and log-probabilities match the sampled
distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillhouse.teacher_service.distributions.sampling import sample_token

LOGITS = torch.tensor([2.0, 1.0, 1.0, 0.0, -1.0, 9.0])
VALID = 5  # the last logit pads the output layer


def drawn(count: int = 4000, **fields: Any) -> dict[int, tuple[float, float]]:
    """Token to (share, log-probability)."""
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "num_valid": VALID} | fields
    generator = torch.Generator().manual_seed(0)
    seen: dict[int, tuple[float, float]] = {}
    for _ in range(count):
        token, logprob = sample_token(LOGITS, **settings, generator=generator)
        share, _ = seen.get(token, (0.0, 0.0))
        seen[token] = (share + 1 / count, logprob)
    return seen


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"temperature": 0.5}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {0}),
        ({"top_k": 100}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
    ],
)
def test_shares_are_those_of_the_tempered_and_cut_distribution(
    fields: dict[str, Any], kept: set[int]
) -> None:
    tempered = LOGITS[:VALID].double() / fields.get("temperature", 1.0)
    mask = torch.tensor([token in kept for token in range(VALID)])
    wanted = tempered.masked_fill(~mask, -torch.inf).softmax(-1)
    seen = drawn(**fields)
    assert set(seen) <= kept
    for token in kept:
        share, logprob = seen.get(token, (0.0, float(wanted[token].log())))
        assert share == pytest.approx(float(wanted[token]), abs=0.04)
        assert logprob == pytest.approx(float(wanted[token].log()), abs=1e-5)


def test_top_k_keeps_exactly_k_also_among_ties() -> None:
    assert len(drawn(top_k=2)) == 2


def test_greedy_takes_the_argmax_of_known_tokens_with_certainty() -> None:
    seen = drawn(3, temperature=0.0)
    assert set(seen) == {0}
    assert seen[0][1] == 0.0
