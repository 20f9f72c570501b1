"""Arithmetic of the benchmarks: ratios by round, bounds, shares and slopes, and the report of a missing peer."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks.overlap import __main__ as overlap
from benchmarks.soak.__main__ import BATCH, TRAINERS, Sample, failed_criteria, report, settled, shares, slope
from benchmarks.student import __main__ as student_loss
from benchmarks.student.sizes import Sizes
from benchmarks.teacher import scoring_only
from benchmarks.teacher.__main__ import outcomes_of
from benchmarks.teacher.models import SHAPES, make_tokenizer
from benchmarks.teacher.passes import CONCURRENCIES, SERVERS, kind_of
from benchmarks.teacher.peers.environment import TRL, VLLM_GRPC, Peers
from benchmarks.teacher.ratios import (
    RATIOS,
    Costs,
    ModelResult,
    Ratio,
    as_json,
    ratio_result,
    table,
    top_k_of,
)
from benchmarks.teacher.rounds import Measured, Options, is_missing
from benchmarks.teacher.servers import EngineSettings
from benchmarks.teacher.timed_pass import Pass, PassInput

ASKED = {
    "score_vs_engine_small_k64": 0.65,
    "score_vs_engine_qwen_k64": 0.72,
    "score_shared_vs_engine_qwen_k64": 1.5,
    "score_vs_http_k64": 10,
    "score_vs_http_k128": 16,
    "score_vs_trl_k64": 10,
    "score_vs_trl_k128": 16,
    "score_vs_vllm_grpc_k64": 4,
    "gen_topk_vs_plain_k64": 0.9,
    "gen_vs_http_k64": 2,
    "gen_vs_vllm_grpc_k64": 1.3,
    "bytes_http_over_ours_k64": 16.5,
    "batch_vs_llm_generate": 0.95,
    "teacher_cpu_k64_over_draws_small": 0.9,
    "teacher_cpu_k64_over_draws_wide": 0.9,
}
COSTS = Costs(body=0.7, head=0.2, select={64: 0.1})
SETTINGS = EngineSettings(dtype="bfloat16", on_cpu=True, threads=1)


def seconds(*pairs: tuple[float, float]) -> ModelResult:
    """Rounds with these seconds of our pass and the engine's, over 100 tokens each."""
    rounds = [
        {"score_k64": Pass(tokens=100, seconds=ours), "engine": Pass(tokens=100, seconds=other)}
        for ours, other in pairs
    ]
    return ModelResult(rounds=rounds, costs=COSTS, computed=0.5, answered=0.25)


def ratio(name: str) -> Ratio:
    return next(each for each in RATIOS if each.name == name)


def test_every_required_ratio_exists_once_with_its_bound() -> None:
    required = {each.name: each.required for each in RATIOS if each.required is not None}
    assert required == ASKED
    assert len({each.name for each in RATIOS}) == len(RATIOS)
    for each in RATIOS:
        assert each.model in SHAPES
        assert {kind_of(each.ours), kind_of(each.other)} <= SERVERS.keys()
    assert CONCURRENCIES.keys() <= SERVERS.keys()
    assert all(len(choices) == 3 for choices in CONCURRENCIES.values())


def test_k_and_kind_are_read_from_the_name_of_a_pass() -> None:
    assert (kind_of("score_packed_k64"), top_k_of("score_packed_k64")) == ("score", 64)
    assert (kind_of("vllm_grpc_k128"), top_k_of("vllm_grpc_k128")) == ("vllm_grpc", 128)
    assert (kind_of("engine_shared"), top_k_of("engine_shared")) == ("engine_shared", 0)


def test_a_ratio_is_the_median_of_the_ratios_of_rounds_not_the_ratio_of_medians() -> None:
    found = ratio_result(ratio("score_vs_engine_small_k64"), seconds((2, 1), (4, 3), (10, 9)))
    assert found is not None
    assert found.values == pytest.approx((0.5, 0.75, 0.9))
    assert found.median == pytest.approx(0.75)
    assert found.ours == pytest.approx(25)
    assert found.other == pytest.approx(100 / 3)


def test_limits_come_from_the_parts_of_the_model() -> None:
    found = ratio_result(ratio("score_vs_engine_small_k64"), seconds((2, 1)))
    assert found is not None
    assert found.limit == pytest.approx(0.7)
    assert found.roofline == pytest.approx(1.0)
    limit = COSTS.limit("shared", 64, computed=0.5, answered=0.25)
    assert limit == pytest.approx(0.35 / (0.35 + 0.3 * 0.25))
    assert COSTS.limit("decode", 64, computed=1, answered=1) == pytest.approx(0.9)
    helped = replace(COSTS, helpers=1)
    assert helped.limit("decode", 64, computed=1, answered=1) == 1
    slow = replace(helped, select={64: 1.1})
    assert slow.limit("decode", 64, computed=1, answered=1) == pytest.approx(0.9)


def test_byte_ratios_are_theirs_over_ours() -> None:
    rounds = [
        {
            "score_packed_k64": Pass(tokens=10, seconds=1, num_bytes=2800),
            "http_k64": Pass(tokens=20, seconds=1, num_bytes=100_800),
        }
    ]
    result = ModelResult(rounds=rounds, costs=None, computed=1, answered=1)
    found = ratio_result(ratio("bytes_http_over_ours_k64"), result)
    assert found is not None
    assert found.median == pytest.approx(18)
    assert found.roofline is None


def test_passes_add_up_and_an_interrupted_round_counts_where_complete() -> None:
    both = Pass(tokens=10, seconds=1, num_bytes=5, teacher_cpu_s=1) + Pass(
        tokens=30, seconds=1, num_bytes=7, teacher_cpu_s=2
    )
    assert both.teacher_us_per_token == 75_000
    assert both.tokens_per_s == 20
    assert both.bytes_per_token == pytest.approx(0.3)
    whole = seconds((2, 1), (1, 1))
    rounds = [*whole.rounds, {"score_k64": both}]
    found = ratio_result(
        ratio("score_vs_engine_small_k64"), ModelResult(rounds=rounds, costs=None, computed=1, answered=1)
    )
    assert found is not None
    assert found.values == pytest.approx((0.5, 1.0))


def test_a_peer_that_cannot_run_is_not_applicable_in_table_and_file() -> None:
    peers = Peers(python=Path("python"), missing={TRL: "no index", VLLM_GRPC: "no index"})
    only = frozenset({"score_vs_engine_small_k64", "score_vs_trl_k64", "gen_vs_vllm_grpc_k64"})
    options = Options(models=("small",), only=only, rounds=1, minutes=1, settings=SETTINGS)
    assert [each.name for each in options.ratios("small", peers)] == ["score_vs_engine_small_k64"]
    assert is_missing(ratio("score_vs_trl_k128"), peers)
    measured = {
        "small": Measured(result=seconds((2, 1)), engine="vllm", commands={}, concurrencies={}, failures={}),
    }
    found = outcomes_of(measured, options, peers)
    written = as_json(found, {"rounds": 1})
    assert written["score_vs_engine_small_k64"] == pytest.approx(0.5)
    assert written["score_vs_trl_k64"] == written["gen_vs_vllm_grpc_k64"] == "n/a"
    assert written["details"] == {"rounds": 1}
    console = Console(file=io.StringIO(), width=170)
    console.print(table(found, "title"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    lines = {name: line for name in only for line in printed.splitlines() if f" {name} " in line}
    assert "0.50 below" in lines["score_vs_engine_small_k64"]
    assert "0.70" in lines["score_vs_engine_small_k64"]
    assert "n/a" in lines["score_vs_trl_k64"]


def test_the_minutes_are_split_over_the_selected_models() -> None:
    def options(*models: str) -> Options:
        return Options(models=models, only=frozenset(), rounds=1, minutes=10, settings=SETTINGS)

    assert options("small").seconds("small") == pytest.approx(600)
    both = options("small", "qwen")
    assert both.seconds("small") + both.seconds("qwen") == pytest.approx(600)


def test_sequences_of_a_group_share_their_beginning_and_a_seed_fixes_them() -> None:
    work = PassInput(count=4, length=12, vocab_size=64, seed=3, group_size=2, shared=8)
    first, second, third, fourth = work.sequences()
    np.testing.assert_array_equal(first[:8], second[:8])
    np.testing.assert_array_equal(third[:8], fourth[:8])
    assert (first[:8] != third[:8]).any()
    assert (first[8:] != second[8:]).any()
    assert {len(each) for each in (first, second, third, fourth)} == {12}
    np.testing.assert_array_equal(first, work.sequences()[0])


def test_groups_share_the_given_average_of_tokens_with_different_lengths() -> None:
    work = PassInput(count=64, length=24, vocab_size=512, seed=3, group_size=2, shared=12, spread=8)
    lengths = work.shared_lengths()
    assert set(lengths) == set(range(8, 16))
    sequences = work.sequences()
    for shared, first, second in zip(lengths[::2], sequences[::2], sequences[1::2], strict=True):
        np.testing.assert_array_equal(first[:shared], second[:shared])
        assert (first[shared:] != second[shared:]).any()


def test_the_synthetic_tokenizer_has_the_requested_size_and_round_trips(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path, 4096))
    assert len(tokenizer) == 4096
    ids = tokenizer.encode("babe kozu, 7 Grüße")
    assert tokenizer.decode(ids) == "babe kozu, 7 Grüße"
    assert len(tokenizer.encode("babe")) == 1


def test_responses_of_the_http_server_are_read_into_the_same_arrays() -> None:
    pytest.importorskip("msgspec", reason="msgspec comes with vllm")
    from benchmarks.teacher import generation_clients, scoring_clients
    from benchmarks.teacher.peers import http_responses

    position = {"7": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}, "3": {"logprob": -1.5, "rank": 2}}
    beyond = {"9": {"logprob": -9.0, "rank": 40}, **position}
    text = json.dumps({"id": "x", "choices": [{"index": 0, "prompt_logprobs": [None, position, beyond]}]})
    rows = http_responses.scored.decode(text.encode()).choices[0].prompt_logprobs[1:]
    token_ids, logprobs = scoring_clients._http_rows(rows, 2)
    assert token_ids.tolist() == [[7, 3], [7, 3]]
    assert logprobs.tolist() == [[-0.5, -1.5], [-0.5, -1.5]]

    inside = {"token_id:3": -1.5, "token_id:7": -0.5}
    outside = {"token_id:9": -9.0, "token_id:7": -0.5, "token_id:3": -1.5}
    text = json.dumps({"choices": [{"text": "", "logprobs": {"top_logprobs": [inside, outside]}}]})
    written = http_responses.event.decode(text.encode()).choices[0].logprobs
    assert written is not None
    token_ids, logprobs = generation_clients._rows(written.top_logprobs, 2)
    assert token_ids.tolist() == [[3, 7], [7, 3]]
    assert logprobs.tolist() == [[-1.5, -0.5], [-0.5, -1.5]]


def test_shares_and_slope_of_a_soak() -> None:
    samples = [
        Sample(
            seconds=60.0 * minute,
            tokens={"a": 100.0 * minute, "b": 300.0 * minute},
            resident_bytes=1000 + (500 if minute == 0 else 20 * minute),
        )
        for minute in range(9)
    ]
    late = settled(samples)
    assert late[0].seconds == 120
    assert shares(late[0], late[-1]) == pytest.approx({"a": 0.25, "b": 0.75})
    assert slope(late) == pytest.approx(20)
    assert slope(samples[:1]) == 0
    assert len(settled(samples[:2])) == 2


@pytest.mark.parametrize(
    ("rates", "growth", "objection"),
    [
        ((100, 100, 50), 0.0, ""),
        ((100, 60, 50), 0.0, "one trainer got"),
        ((100, 100, 10), 0.0, "batch job got"),
        ((100, 100, 50), 0.05, "grew by"),
    ],
)
def test_a_soak_reports_unfair_shares_and_growth(
    rates: tuple[int, ...], growth: float, objection: str
) -> None:
    names = (*TRAINERS, BATCH)
    samples = [
        Sample(
            seconds=10.0 * at,
            tokens={name: rate * at for name, rate in zip(names, rates, strict=True)},
            resident_bytes=int(1e9 * (1 + growth * at / 10)),
        )
        for at in range(20)
    ]
    found = failed_criteria(samples, [])
    assert [objection in each for each in found] == [True] * bool(objection)
    assert failed_criteria(samples, ["it broke"])[0] == "1 failures"
    assert report(samples, []).row_count == 6


def test_scoring_only_compares_three_sizes_with_engine_and_http() -> None:
    asked = [ratio(name) for name in scoring_only.NAMES]
    sizes = ("score_k20", "score_k64", "score_k128")
    assert {(each.ours, each.other) for each in asked} == {
        *((size, "engine") for size in sizes),
        *((size, size.replace("score", "http")) for size in sizes),
    }
    options = Options(
        models=("small",), only=frozenset(scoring_only.NAMES), rounds=1, minutes=1, settings=SETTINGS
    )
    assert options.requirements() == frozenset()


def test_the_interval_of_an_overlap_is_of_ratios_pair_by_pair() -> None:
    drifting = np.linspace(1.0, 3.0, 40)
    assert overlap.interval((1.05 * drifting).tolist(), drifting.tolist()) == pytest.approx(
        (1.05, 1.05, 1.05)
    )
    noisy = np.random.default_rng(1).normal(1.0, 0.1, 40)
    low, middle, high = overlap.interval(noisy.tolist(), [1.0] * 40)
    assert low < middle < high
    assert 0.02 < high - low < 0.15


@pytest.mark.slow
def test_a_students_step_is_measured_at_any_size_in_a_process_of_its_own() -> None:
    sizes = Sizes(vocabulary=512, sequences=1, hidden=64, layers=1, heads=2)
    found = student_loss.measure(student_loss.MethodPass(method="ours", chunk=64), 2, sizes)
    assert found.seconds > 0
    assert 0 < found.loss < 20
    assert student_loss.measure(student_loss.MethodPass(method="products", chunk=100), 1, sizes).seconds > 0
    with pytest.raises(RuntimeError, match="nowhere"):
        student_loss.measure(student_loss.FULL, 1, replace(sizes, device="nowhere"))
