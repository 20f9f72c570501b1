"""Quantisation in vLLM: supported methods are reported, refusals quote vLLM in one sentence."""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, ScoreInput
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.quantised_models import GROUP, ZERO, Layout, quantised_copy
from tests.teacher_service.calls import Teacher, random_ids, reference_logprobs
from tests.teacher_service.conftest import loaded

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

from stillhouse.teacher_service.engines.vllm.engine import VllmEngine
from stillhouse.teacher_service.engines.vllm.engine_args import dtype_argument, method_argument
from tests.support.programs import start_teacher

KERNEL_OF_FOUR_BITS = "cpu_gemm_wna16"
"""vLLM's CPU kernel for such weights; builds for processors without AVX-512 lack it."""


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("nonsense", "Unknown quantization method: nonsense"),
        ("awq", "Cannot find the config file for awq"),
        ("torchao", "torchao_config"),
    ],
)
def test_refusals_of_vllm_are_quoted(models: Models, method: str, part: str) -> None:
    config = TeacherConfig(model=str(models.teacher), engine="vllm", quantization=method, kv_cache_gib=0.25)
    with no_process_left(), pytest.raises(StillhouseError) as caught:
        asyncio.run(VllmEngine.load(config))
    assert caught.value.reason == Reason.INVALID_CONFIG
    assert part in caught.value.message
    assert "validation error" not in caught.value.message
    assert "type=value_error" not in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.slow
def test_a_quantised_teacher_reports_its_method(models: Models, tmp_path: Path) -> None:
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher,
            engine="vllm",
            directory=tmp_path,
            options=["--quantization", "int8_per_channel_weight_only", "--kv-cache-gib", "0.25"],
            environment=mark,
        ) as program,
    ):
        teacher = Teacher(program.target)
        assert teacher.info.quantization == "int8_per_channel_weight_only"
        assert teacher.info.dtype == "bfloat16"
        ids = random_ids(60)
        exact = reference_logprobs(models.teacher, ids)[np.arange(59), ids[1:]]
        answer = teacher.score_one(ids, top_k=4).target_logprobs
        assert 1e-3 < np.abs(answer - exact).mean() < 0.3
        teacher.close()


@pytest.mark.parametrize("layout", ["awq", "gptq"])
def test_packed_bits_mean_the_same_to_vllm(models: Models, tmp_path: Path, layout: Layout) -> None:
    from vllm.model_executor.layers.quantization.utils import quant_utils
    from vllm.scalar_type import scalar_types

    packed, meant = (
        load_file(each / "model.safetensors") for each in quantised_copy(models.teacher, layout, tmp_path)
    )
    names = [name.removesuffix("qweight") for name in packed if name.endswith("qweight")]
    assert len(names) == 14
    for name in names:
        quants_IO = quant_utils.unpack_quantized_values_into_int32(
            packed[f"{name}qweight"], scalar_types.uint4, 1 if layout == "awq" else 0
        )
        if layout == "awq":
            quants_IO = quants_IO.unflatten(1, (-1, 8))[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1)
        scales_IO = packed[f"{name}scales"].float().repeat_interleave(GROUP, 0)
        torch.testing.assert_close((quants_IO - ZERO) * scales_IO, meant[f"{name}weight"].T, rtol=0, atol=0)


@pytest.mark.slow  # `make test` compares the bits that both layouts mean, without an engine
@pytest.mark.parametrize("layout", ["awq", "gptq"])
def test_a_four_bit_checkpoint_scores_like_its_dequantised_weights(
    models: Models, tmp_path: Path, layout: Layout
) -> None:
    packed, meant = quantised_copy(models.teacher, layout, tmp_path)
    config = TeacherConfig(
        model=str(packed), engine="vllm", dtype="bfloat16", max_adapters=0, kv_cache_gib=0.25
    )
    ids = random_ids(60)
    item = ScoreInput(token_ids=ids, start=1, options=DistributionOptions(top_k=4))

    async def answer() -> tuple[str, Distributions]:
        async with loaded(config) as engine:
            return engine.info.quantization, await engine.score(item)

    from vllm import _custom_ops  # noqa: F401 - loads what this processor has

    if not hasattr(torch.ops._C, KERNEL_OF_FOUR_BITS):
        with pytest.raises(StillhouseError, match=f"quantised by .*{layout}.* no kernel") as caught:
            asyncio.run(answer())
        assert caught.value.reason == Reason.INVALID_CONFIG
        return
    name, got = asyncio.run(answer())
    assert layout in name
    exact, whole = (
        reference_logprobs(model, ids)[np.arange(59), ids[1:]] for model in (meant, models.teacher)
    )
    error = np.abs(got.target_logprobs - exact).mean()
    # bfloat16 alone moves these by about 0.06; four bits instead of all by more than 1.
    assert error < 0.2 < 0.5 * np.abs(whole - exact).mean()


def test_dtypes_and_method_names_follow_the_engine(models: Models, tmp_path: Path) -> None:
    config = TeacherConfig(model=str(models.teacher), engine="vllm")
    assert dtype_argument(config, models.teacher, on_cpu=True) == "float32"
    assert dtype_argument(config, models.teacher, on_cpu=False) == "auto"
    asked = TeacherConfig(model=str(models.teacher), engine="vllm", quantization="fp8")
    assert dtype_argument(asked, models.teacher, on_cpu=True) == "auto"
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert dtype_argument(config, tmp_path, on_cpu=True) == "auto"
    assert method_argument("bitsandbytes-4bit") == method_argument("nf4") == "bitsandbytes"
    with pytest.raises(StillhouseError, match="vLLM does not quantise to int8 while it loads"):
        method_argument("int8")
    assert method_argument("fp8") == "fp8"
