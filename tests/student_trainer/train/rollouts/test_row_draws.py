"""Draws of rows on a CPU: those of the tensors' own arithmetic, and a row is there as soon as it has ended."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import RolloutConfig, StudentConfig
from stillhouse.student_trainer.train.rollouts import draws_numba
from stillhouse.student_trainer.train.rollouts.local_sampler import LocalSampler, SampledText
from stillhouse.student_trainer.train.rollouts.row_buffer import RowBuffer
from stillhouse.student_trainer.train.rollouts.token_sampler import LARGEST_UNIFORM, Support, TokenSampler
from stillhouse.student_trainer.train.student.student import Student

PLAIN = RolloutConfig()


@pytest.mark.parametrize(
    ("size", "likeliest", "draws", "generation"),
    [
        (5000, 16, 64, PLAIN),
        (300, 8, 32, RolloutConfig(temperature=0.7, top_p=0.9)),
        (16, 16, 4, PLAIN),
        (130, 0, 0, PLAIN),
        (70, 4, 0, PLAIN),
    ],
)
def test_compiled_draws_are_those_of_tensors(
    size: int, likeliest: int, draws: int, generation: RolloutConfig
) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(64, size + 3, generator=generator) * 3
    uniform, places = torch.rand(2, 64, dtype=torch.float64, generator=generator).clamp(max=LARGEST_UNIFORM)
    uniform[0], places[0], uniform[1] = LARGEST_UNIFORM, LARGEST_UNIFORM, 0.0
    sampler = TokenSampler(num_valid=size, num_likeliest=likeliest, num_draws=draws, generation=generation)
    buffer = RowBuffer(sampler, torch.stack([uniform, places]).unsqueeze(1).numpy())
    buffer.draw(torch.zeros(64, dtype=torch.int64), torch.arange(64), logits)
    tokens, logprobs, ids, drawn, shares = map(torch.from_numpy, buffer.row(0, 64))
    empty = (0, draws - drawn.shape[1])
    assert not drawn.numel() or (drawn >= 0).any(0).all()
    support = Support(
        ids,
        *(torch.nn.functional.pad(each, empty, value=value) for each, value in ((drawn, -1), (shares, 0))),
    )
    expected, others = sampler.draw(logits, uniform), sampler.support(logits, places)
    assert torch.equal(tokens, expected.tokens.int())
    torch.testing.assert_close(logprobs, expected.logprobs)
    assert torch.equal(support.likeliest, others.likeliest)
    same = support.draws == others.draws  # a place on the border of two ids is rounded
    assert draws == 0 or same.float().mean() > 0.99
    if draws and size > likeliest:
        tail = logits[:, :size].softmax(-1).scatter(-1, support.likeliest.long(), 0.0)
        step = (tail.sum(-1, keepdim=True) / draws).clamp(min=sampler.least_step)
        is_drawn = support.draws >= 0
        shares = (tail.gather(-1, support.draws.long().clamp(min=0)) / step).clamp(max=1) / draws
        torch.testing.assert_close(support.draw_logprobs, torch.where(is_drawn, shares.log(), 0.0))
        assert ((support.draws.diff(dim=-1) > 0) | ~is_drawn[:, 1:]).all()
        assert (is_drawn[:, 1:] <= is_drawn[:, :-1]).all()
        assert is_drawn.any()
        assert not is_drawn.all()
    elif draws:
        assert (support.draws == -1).all()
        assert (support.draw_logprobs == 0).all()


def test_draws_have_their_probabilities() -> None:
    probs = torch.randn(300, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    places = ((np.arange(50_000) + 0.5) / 50_000).clip(max=LARGEST_UNIFORM)
    tokens = draws_numba.draw_tokens(probs.expand(50_000, 300).contiguous().numpy(), places)
    np.testing.assert_allclose(np.bincount(tokens, minlength=300) / 50_000, probs, atol=2e-5)


def test_a_row_with_a_logit_that_is_not_finite_is_refused() -> None:
    sampler = TokenSampler(num_valid=40, num_likeliest=3, num_draws=5, generation=PLAIN)
    logits = torch.zeros(2, 40)
    logits[1, 7] = torch.nan
    buffer = RowBuffer(sampler, np.full((2, 2, 1), 0.5))
    buffer.draw(torch.arange(2), torch.zeros(2, dtype=torch.int64), logits)
    assert len(buffer.row(0, 1).tokens) == 1
    with pytest.raises(StillhouseError, match="non-finite while it samples") as error:
        buffer.row(1, 1)
    assert error.value.reason is Reason.NON_FINITE


def test_texts_that_end_early_are_told_before_the_others_are_written() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model: Any = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = 3
    sampler = LocalSampler(
        Student(model, SimpleNamespace(eos_token_id=3), StudentConfig(model="student")),
        device=torch.device("cpu"),
        autocast=nullcontext,
        vocab_size=64,
        num_likeliest=4,
        num_draws=2,
    )
    prompts = [np.arange(length, dtype=np.int32) + 4 for length in (3, 5, 8, 2)]
    generation = RolloutConfig(max_new_tokens=120, samples_per_prompt=2)
    told: dict[tuple[int, int], SampledText] = {}
    rooms: list[int] = []

    def on_text(prompt: int, sample: int, text: SampledText) -> None:
        told[prompt, sample] = text
        rooms.append(len(text.token_ids))

    written = sampler.write(prompts, generation, max_sequence_tokens=64, seeds=[1, 2, 3, 4], on_text=on_text)
    assert rooms == sorted(rooms)
    assert len(set(rooms)) > 2
    for prompt, several in enumerate(written):
        for sample, text in enumerate(several):
            assert told[prompt, sample] is text
            assert text.finished == (text.token_ids[-1] == 3)
            assert len(text.token_ids) <= 64 - len(prompts[prompt])
