"""The target that `auto` becomes by the run file alone, and the settings that a user gave beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stillhouse.protos.tensors.layout import encode_scaled, encode_sorted, packed_bits
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.config.rules.loss import takes_draw_logprobs
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.config.settled.target_choice import (
    DRAW_LOGPROB_BITS,
    MOST_DRAWS,
    TargetChoice,
    settle_config,
    settle_spec,
    unsettled,
)
from tests.student_trainer.config.specs import changed

TWO_TEACHERS = [{"name": "a", "targets": ["a:1"]}, {"name": "b", "targets": ["b:1"]}]


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("loss.terms", [{"divergence": "reverse_kl"}], "reverse_kl weighs tokens by the student"),
        ("loss.terms", [{}, {"divergence": "mse", "weight": 0.1}], "mse is no f-divergence"),
        ("loss.terms", [{"divergence": "adaptive_kl"}], "adaptive_kl is no f-divergence"),
        ("loss.terms", [{"divergence": "jsd", "beta": 1}], "jsd weighs tokens by the student"),
        ("loss.terms", [{"divergence": "skew_reverse_kl", "alpha": 0}], "weighs tokens by the student"),
        ("loss.terms", [{"divergence": "alpha_beta", "alpha": 0.4, "beta": 0.6}], "by the student"),
        ("loss", {"temperature": 2, "temperature_mode": "conditional"}, "compares the kept tokens alone"),
        ("teachers", TWO_TEACHERS, "several teachers are mixed"),
        ("loss", {"terms": [{"weight": 0}], "hard_weight": 1}, "no term has a weight"),
        ("loss.foreign_tokenizer", "alm", "the text's own tokens alone"),
    ],
)
def test_a_run_file_that_draws_do_not_suit_is_settled_at_once(path: str, value: Any, why: str) -> None:
    loss = from_proto(changed(path, value)).loss
    assert (loss.sparse_target, loss.top_k) == ("tail_bucket", 64)
    assert why in loss.sparse_target_reason


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"hard_weight": 0.5, "temperature": 2},
        {"terms": [{}, {"divergence": "mse", "weight": 0}]},
        {"terms": [{"divergence": "jsd"}, {"divergence": "tvd"}, {"divergence": "skew_kl"}]},
        {"terms": [{"divergence": "skew_reverse_kl"}, {"divergence": "alpha_beta"}]},
    ],
)
def test_all_others_wait_for_the_teacher(loss: dict[str, Any]) -> None:
    config = from_proto(changed("loss", loss))
    assert [path for path, _ in unsettled(config)] == ["loss"]
    assert config.loss.top_k is None
    assert config.evaluation.top_k == 64


@pytest.mark.parametrize(
    ("loss", "form", "top_k", "num_samples"),
    [
        (LossConfig(), "top_k_and_sampled", 16, 90),
        (LossConfig(), "sampled_tail", 16, 48),
        (LossConfig(top_k=32), "top_k_and_sampled", 32, 60),
        (LossConfig(top_k=8), "sampled_tail", 8, 56),
        (LossConfig(top_k=64), "sampled_tail", 64, 48),
        (LossConfig(num_samples=7), "sampled_tail", 16, 7),
        (LossConfig(num_samples=7), "stratified_tail", 16, 7),
    ],
)
def test_draws_take_the_bytes_of_64_tokens_and_keep_what_the_user_gave(
    loss: LossConfig, form: str, top_k: int, num_samples: int
) -> None:
    choice = TargetChoice.draws(loss, "why", form=form, vocab_size=151_936)
    assert (choice.top_k, choice.num_samples) == (top_k, num_samples)
    if loss.top_k is None and loss.num_samples is None:
        assert (choice.top_k * 34 + choice.num_samples * (34 if form == "sampled_tail" else 18)) / 8 <= 272


@pytest.mark.parametrize("vocab_size", [2, 4096, 32_000, 151_936])
@pytest.mark.parametrize(
    ("divergence", "temperature"), [("forward_kl", 1.5), ("forward_kl", 2.0), ("jsd", 1.0), ("tvd", 4.0)]
)
def test_stratified_draws_fit_even_where_they_are_spread_evenly(
    vocab_size: int, divergence: str, temperature: float
) -> None:
    loss = LossConfig(terms=(LossTermConfig(divergence=divergence),), temperature=temperature)
    choice = TargetChoice.draws(loss, "why", form="stratified_tail", vocab_size=vocab_size)
    assert choice.sparse_target_reason == "why"
    count = choice.num_samples
    ids = np.random.default_rng(0).integers(0, vocab_size, (200, count))
    num_bytes = bytes_of_draws(ids, loss, vocab_size)
    assert num_bytes <= 272
    if vocab_size > 1000 and count != MOST_DRAWS:
        assert num_bytes > 0.93 * 272
    if not takes_draw_logprobs(loss):
        assert count <= MOST_DRAWS


@pytest.mark.parametrize(("vocab_size", "least"), [(4096, 192), (32_000, 192), (151_936, 170)])
def test_draws_at_temperature_1_fit_where_they_crowd_as_tokens_of_text_do(
    vocab_size: int, least: int
) -> None:
    """Ids by Zipf's law, the frequent ones first as a tokenizer numbers them, without the likeliest 16."""
    loss = LossConfig()
    count = TargetChoice.draws(loss, "why", form="stratified_tail", vocab_size=vocab_size).num_samples
    cumulative = (1 / (np.arange(16, vocab_size) + 2.7)).cumsum()
    places = (np.arange(count) + np.random.default_rng(0).random((200, 1))) / count
    ids = 16 + np.searchsorted(cumulative, places * cumulative[-1])
    assert least <= count <= MOST_DRAWS
    assert bytes_of_draws(ids, loss, vocab_size) <= 272


def bytes_of_draws(ids: np.ndarray, loss: LossConfig, vocab_size: int) -> float:
    """Bytes of a row's draws, ids [rows, draws], with the top 16 beside them."""
    bits, rows = packed_bits(vocab_size), len(ids)
    num_bytes = len(encode_sorted(np.sort(ids, axis=1), bits=bits).data) / rows + 16 * (bits + 16) / 8
    if takes_draw_logprobs(loss):
        logprobs = (ids / vocab_size).astype(np.float32)
        num_bytes += len(encode_scaled(logprobs, bits=DRAW_LOGPROB_BITS).data) / rows
    return num_bytes


OWN_TEXTS = {"student": {}, "loss": {"terms": [{"divergence": "reverse_kl"}]}}


@pytest.mark.parametrize(
    ("contexts", "waits"),
    [
        ([OWN_TEXTS], True),
        ([{**OWN_TEXTS, "dataset": {}}], False),
        ([{"dataset": {}, "loss": OWN_TEXTS["loss"]}, OWN_TEXTS], False),
        ([{"student": {}, "loss": {**OWN_TEXTS["loss"], "temperature": 2}}], False),
        ([{"student": {}, "loss": {"terms": [*OWN_TEXTS["loss"]["terms"], {}]}}], False),
    ],
    ids=["own", "dataset", "both", "temperature", "forward"],
)
def test_reverse_kl_waits_for_the_teacher_where_the_student_draws(
    contexts: list[dict[str, Any]], *, waits: bool
) -> None:
    for context in contexts:
        if "dataset" in context:
            context.pop("student", None)
    config = from_proto(changed("contexts", contexts))
    assert [path for path, _ in unsettled(config)] == (["contexts[0].loss"] if waits else [])


@pytest.mark.parametrize(
    ("loss", "room", "longest", "expected"),
    [
        (LossConfig(), 1024, 512, (16, 512)),
        (LossConfig(), 256, 512, (16, 240)),
        (LossConfig(), 70, 512, (16, 54)),
        (LossConfig(top_k=32), 1024, 512, (32, 512)),
        (LossConfig(num_samples=9), 256, 512, (16, 9)),
        (LossConfig(), 40, 512, None),
        (LossConfig(), 1024, 13_900, (16, 512)),
        (LossConfig(), 1024, 32_768, (16, 208)),
        (LossConfig(), 1024, 1_000_000, None),
    ],
)
def test_the_student_draws_as_much_as_the_teacher_may_be_queried_for(
    loss: LossConfig, room: int, longest: int, expected: tuple[int, int] | None
) -> None:
    choice = TargetChoice.own_draws(loss, "why", max_query_tokens=room, max_new_tokens=longest)
    assert (choice and (choice.top_k, choice.num_samples)) == expected
    if choice is not None:
        assert ("in the place of 512" in choice.sparse_target_reason) == (
            expected in {(16, 240), (16, 54), (16, 208)}
        )


def test_named_targets_keep_their_defaults() -> None:
    for target in (
        "tail_bucket",
        "sampled",
        "top_k_and_sampled",
        "sampled_tail",
        "stratified_tail",
        "renormalise",
    ):
        loss = from_proto(changed("loss.sparse_target", target)).loss
        assert (loss.sparse_target, loss.top_k, loss.num_samples) == (target, 64, 50)
        assert loss.sparse_target_reason == ""


def test_configuration_and_effective_spec_are_settled_alike() -> None:
    spec = changed("contexts", [{"dataset": {}}, {"dataset": {}, "loss": {"hard_weight": 1}}])
    config = from_proto(spec)
    choices = {
        path: TargetChoice.draws(loss, f"of {path}", form="stratified_tail", vocab_size=4096)
        for path, loss in unsettled(config)
    }
    assert set(choices) == {"loss", "contexts[1].loss"}
    effective = to_proto(config)
    settle_spec(effective, choices)
    assert from_proto(effective) == settle_config(config, choices)
    assert effective.contexts[1].loss.sparse_target_reason == "of contexts[1].loss"
    assert {path: TargetChoice.from_json(each.to_json()) for path, each in choices.items()} == choices
