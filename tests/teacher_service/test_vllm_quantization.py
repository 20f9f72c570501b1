"""Quantisation in vLLM: what works says so, and what vLLM refuses is told in vLLM's own words, in one sentence."""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from protos.errors import Reason, StillhouseError
from teacher_service.config import TeacherConfig
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.teacher_service.calls import Teacher, random_ids, reference_logprobs

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

from examples.programs import start_teacher
from teacher_service.vllm_engine import VllmEngine
from teacher_service.vllm_quantization import dtype_argument, method_argument


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("nonsense", "Unknown quantization method: nonsense"),
        ("awq", "Cannot find the config file for awq"),
        ("torchao", "torchao_config"),
    ],
)
def test_what_vllm_refuses_is_told_in_its_words(models: Models, method: str, part: str) -> None:
    config = TeacherConfig(model=str(models.teacher), engine="vllm", quantization=method, kv_cache_gib=0.25)
    with no_process_left(), pytest.raises(StillhouseError) as caught:
        asyncio.run(VllmEngine.load(config))
    assert caught.value.reason == Reason.INVALID_CONFIG
    assert part in caught.value.message
    assert "validation error" not in caught.value.message
    assert "type=value_error" not in caught.value.message
    assert "\n" not in caught.value.message


def test_a_quantised_teacher_says_by_what(models: Models, tmp_path: Path) -> None:
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


def test_types_and_names_go_together(models: Models, tmp_path: Path) -> None:
    config = TeacherConfig(model=str(models.teacher), engine="vllm")
    assert dtype_argument(config, models.teacher, on_cpu=True) == "float32"
    assert dtype_argument(config, models.teacher, on_cpu=False) == "auto"
    asked = TeacherConfig(model=str(models.teacher), engine="vllm", quantization="fp8")
    assert dtype_argument(asked, models.teacher, on_cpu=True) == "auto"
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert dtype_argument(config, tmp_path, on_cpu=True) == "auto"
    assert method_argument("bitsandbytes-4bit") == "bitsandbytes"
    assert method_argument("fp8") == "fp8"
