"""Parts of the vLLM engine without a model: arguments, environment, rows, seeded sampling."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.distributions.tail import log_tail
from stillhouse.teacher_service.engine import GenerateInput
from stillhouse.teacher_service.engines.vllm import engine_args
from stillhouse.teacher_service.engines.vllm.engine_args import (
    engine_arguments,
    require_vllm,
    set_cpu_environment,
    set_environment,
)
from stillhouse.teacher_service.engines.vllm.flat_logprobs import to_distributions
from stillhouse.teacher_service.engines.vllm.worker.request_plan import HELPER_THREADS_VARIABLE

pytest.importorskip("vllm", reason="vllm is not installed")

from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs


@pytest.fixture
def config(tmp_path: Path) -> TeacherConfig:
    (tmp_path / "config.json").write_text("{}")
    return TeacherConfig(model=str(tmp_path), engine="vllm")


def flat_rows(rows: list[list[tuple[int, float]] | None]) -> FlatLogprobs:
    flat = FlatLogprobs()
    for row in rows:
        if row is None:
            flat.append(None)
        else:
            ids, logprobs = zip(*row, strict=True)
            flat.append_fast(list(ids), list(logprobs), iter(range(len(row))), [None] * len(row))
    return flat


def test_the_actual_token_comes_first_and_may_occur_again() -> None:
    flat = flat_rows([None, [(7, -3.0), (1, -0.5), (2, -1.5)], [(2, -0.7), (2, -0.7), (5, -0.9)]])
    got = to_distributions(flat, first_row=1, num_rows=2, top_k=2, start=1, vocab_size=10)
    assert got.token_ids.tolist() == [[1, 2], [2, 5]]
    assert got.target_logprobs.tolist() == pytest.approx([-3.0, -0.7])
    assert got.logprobs[1].tolist() == pytest.approx([-0.7, -0.9])
    tail = 1 - np.exp(got.logprobs.astype(np.float64)).sum(1)
    np.testing.assert_allclose(np.exp(got.log_tail), tail, rtol=1e-6)
    assert to_distributions(flat, first_row=2, num_rows=1, top_k=2, start=2, vocab_size=10).start == 2


def test_outputs_joined_by_vllm_read_the_same() -> None:
    chunks = []
    for there, its_rank in ((1, 3), (9, 17)):
        ids, logprobs, ranks = [there, 4, 2, 1], [-2.0 * its_rank, -0.5, -1.5, -6.0], [its_rank, 1, 2, 3]
        flat = FlatLogprobs()
        flat.append_fast(ids, logprobs, iter(ranks), [None] * 4)
        chunks.append(flat)
    alone = [
        to_distributions(flat, first_row=0, num_rows=1, top_k=3, start=5 + index, vocab_size=32)
        for index, flat in enumerate(chunks)
    ]
    chunks[0].extend(chunks[1])  # what RequestOutput.add does
    chunks[1].extend(chunks[0])
    joined = to_distributions(chunks[0], first_row=0, num_rows=2, top_k=3, start=5, vocab_size=32)
    assert (
        len(chunks[1].token_ids) == 11
    )  # the token at rank 3 has lost a place, which the values above must not show
    twice = to_distributions(chunks[1], first_row=1, num_rows=2, top_k=3, start=5, vocab_size=32)
    for got in (joined, twice):
        for row, want in enumerate(alone):
            assert got.token_ids[row].tolist() == want.token_ids[0].tolist() == [4, 2, 1]
            assert got.logprobs[row].tolist() == want.logprobs[0].tolist()
            assert got.target_logprobs[row] == want.target_logprobs[0]


def test_rows_of_another_width_are_not_misread() -> None:
    flat = flat_rows([None, [(7, -3.0), (1, -0.5)], [(2, -0.7), (2, -0.7), (5, -0.9)]])
    with pytest.raises(RuntimeError, match="not all 3 wide"):
        to_distributions(flat, first_row=1, num_rows=2, top_k=2, start=1, vocab_size=10)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_logprobs_are_an_error_with_the_position(value: float) -> None:
    flat = flat_rows([None, [(7, -3.0), (1, -0.5)], [(2, value), (2, value)]])
    with pytest.raises(StillhouseError, match="position 2") as caught:
        to_distributions(flat, first_row=1, num_rows=2, top_k=1, start=1, vocab_size=10)
    assert caught.value.reason is Reason.NON_FINITE


def test_the_tail_is_zero_for_the_complete_vocabulary_and_bounded_by_the_last_of_the_top_k() -> None:
    uniform = np.full((1, 8), np.log(1 / 8), dtype=np.float32)
    assert log_tail(uniform, 8).tolist() == [-np.inf]
    assert np.exp(log_tail(uniform[:, :6], 8)) == pytest.approx([0.25], abs=1e-6)
    assert log_tail(np.zeros((2, 0), np.float32), 8).tolist() == [0.0, 0.0]
    # Rounding leaves 6e-8 here, but two tokens below 1e-20 cannot hold it.
    peaked = np.array([[-5.9604645e-08, np.log(1e-20)]], dtype=np.float32)
    assert np.exp(log_tail(peaked, 4)) == pytest.approx([2e-20], rel=1e-3)


def test_a_cpu_keeps_the_last_adapter_slot_empty_and_a_gpu_needs_not(
    config: TeacherConfig, tmp_path: Path
) -> None:
    on_cpu = engine_arguments(config, tmp_path, on_cpu=True, vocab_size=1000)
    on_gpu = engine_arguments(config, tmp_path, on_cpu=False, vocab_size=1000)
    assert (on_cpu["max_loras"], on_gpu["max_loras"]) == (config.max_adapters + 1, config.max_adapters)
    assert on_cpu["enforce_eager"]
    assert "enforce_eager" not in on_gpu
    assert "kv_cache_memory_bytes" not in on_gpu
    assert (on_cpu["dtype"], on_gpu["dtype"]) == ("float32", "auto")
    assert "enable_lora" not in engine_arguments(
        replace(config, max_adapters=0), tmp_path, on_cpu=True, vocab_size=1000
    )
    with pytest.raises(StillhouseError, match="up to rank 512"):
        engine_arguments(replace(config, max_lora_rank=513), tmp_path, on_cpu=True, vocab_size=1000)


def test_a_large_vocabulary_bounds_the_batch_of_a_cpu(config: TeacherConfig, tmp_path: Path) -> None:
    assert engine_arguments(config, tmp_path, on_cpu=True, vocab_size=4096)["max_num_batched_tokens"] == 2048
    assert engine_arguments(config, tmp_path, on_cpu=True, vocab_size=151936)["max_num_batched_tokens"] == 883
    assert (
        engine_arguments(config, tmp_path, on_cpu=False, vocab_size=151936)["max_num_batched_tokens"] == 8192
    )


def test_vllm_takes_every_argument(config: TeacherConfig, tmp_path: Path) -> None:
    from vllm import AsyncEngineArgs

    for on_cpu in (True, False):
        arguments = engine_arguments(
            replace(config, quantization="fp8"), tmp_path, on_cpu=on_cpu, vocab_size=1000
        )
        AsyncEngineArgs(**arguments)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "0.34.0rc1+cpu"])
def test_an_unsupported_version_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_args, "_installed_version", lambda: version)
    with pytest.raises(StillhouseError, match=r"works with vLLM 0\.32 or 0\.33") as caught:
        require_vllm()
    assert version in str(caught.value)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.0rc2"])
def test_supported_versions_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_args, "_installed_version", lambda: version)
    assert require_vllm() == version


def test_without_vllm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_args, "find_spec", lambda name: None)
    with pytest.raises(StillhouseError, match=r"stillhouse\[teacher-cpu\].*--engine hf"):
        require_vllm()


def test_the_operators_environment_stays(config: TeacherConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_MSGPACK_ZERO_COPY_THRESHOLD", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    set_environment(replace(config, threads=2))
    assert os.environ["VLLM_MSGPACK_ZERO_COPY_THRESHOLD"] == "1"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_waiting_threads_turn_briefly_unless_the_operator_chose(
    config: TeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    for name in ("OMP_WAIT_POLICY", "VLLM_USE_V2_MODEL_RUNNER", "TORCH_COMPILE_DISABLE"):
        monkeypatch.setenv(name, "")  # restored after the test, as the next two
    for name in (HELPER_THREADS_VARIABLE, "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(engine_args, "num_cores", lambda: 2)
    for chosen, given, turns in (("1", "", engine_args.SPINS), ("1", "7", "7"), ("4", "", None)):
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
        if not given:
            monkeypatch.delenv("GOMP_SPINCOUNT")
        set_cpu_environment(config)
        assert os.environ.get("GOMP_SPINCOUNT") == turns


def draws(seed: int, num_valid: int = 6, **how: float) -> Any:
    """Samples of vLLM's worker for a request with a seed."""
    from stillhouse.teacher_service.engines.vllm.worker.seeded_logits_processor import (
        SeededSampling,
        sampling_argument,
    )

    item = GenerateInput(token_ids=np.zeros(1, np.int32), seed=seed, **how)  # type: ignore[arg-type]
    params = SamplingParams(extra_args=sampling_argument(item, num_valid=num_valid))
    return SeededSampling.new_req_logits_processor(None, params)  # type: ignore[arg-type]


def test_seeded_samples_follow_the_distribution_without_padding() -> None:
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 0.2, 9.0, 9.0])
    before = logits_V.clone()
    counts = np.zeros(8)
    for seed in range(3000):
        counts[int(draws(seed)([1, 2, 3], logits_V).argmax())] += 1
    assert torch.equal(logits_V, before)
    expected = 3000 * logits_V[:6].softmax(0).numpy()
    assert counts[6:].sum() == 0
    assert (
        (counts[:6] - expected) ** 2 / expected
    ).sum() < 20.5  # 0.1 % of chi-square with 5 degrees of freedom


def test_a_seeded_sample_depends_on_seed_and_position_alone() -> None:
    logits_V = torch.zeros(1000)
    first = [int(draws(7, 1000)(list(range(n)), logits_V).argmax()) for n in range(20)]
    assert first == [int(draws(7, 1000)([0] * n, logits_V).argmax()) for n in range(20)]
    assert len(set(first)) > 10
    for other in (8, -7, 7 + 2**32, 2**63 - 1):
        assert first != [int(draws(other, 1000)([0] * n, logits_V).argmax()) for n in range(20)]
    assert {int(draws(seed, 1000, top_k=1)([], torch.arange(1000.0)).argmax()) for seed in range(5)} == {999}


def test_sampling_from_non_finite_logits_does_not_kill_the_worker() -> None:
    logits_V = torch.tensor([0.0, torch.nan, 1.0, 0.0, 0.0, 0.0])
    assert draws(1)([], logits_V) is logits_V
