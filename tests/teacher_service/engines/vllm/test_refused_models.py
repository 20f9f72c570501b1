"""Models that vLLM would serve as others, or as noise: refused by name at load, as the reference engine does."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engines.hf.model import HfModel
from tests.conftest import Models
from tests.teacher_service.conftest import loaded

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]
WEIGHTS = "model.safetensors"


def config_of(model: Path, engine: str = "vllm") -> TeacherConfig:
    return TeacherConfig(model=str(model), engine=engine, dtype="float32", kv_cache_gib=0.25)  # type: ignore[arg-type]


async def refusal(model: Path) -> StillhouseError:
    """The error of a vLLM engine that does not start."""
    with pytest.raises(StillhouseError) as caught:
        async with loaded(config_of(model)):
            pass
    return caught.value


async def test_a_head_of_its_own_is_computed_with_or_refused(models: Models, tmp_path: Path) -> None:
    """transformers takes the file's head where it differs from the embedding that the settings tie it to; vLLM ties them."""
    model = tmp_path / "model"
    shutil.copytree(models.teacher, model)
    weights = load_file(model / WEIGHTS)
    assert json.loads((model / "config.json").read_bytes())["tie_word_embeddings"]
    head = weights["model.embed_tokens.weight"].flip(0)
    save_file({**weights, "lm_head.weight": head.contiguous()}, model / WEIGHTS, {"format": "pt"})
    served = HfModel.load(config_of(model, "hf"), model).model
    assert torch.equal(served.get_output_embeddings().weight, head)
    error = await refusal(model)
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert "has lm_head.weight with values of its own" in error.message
    assert "Set tie_word_embeddings to false" in error.message


@pytest.mark.slow
async def test_weights_that_are_no_numbers_are_named(models: Models, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(models.teacher, model)
    weights = load_file(model / WEIGHTS)
    key = "model.layers.1.self_attn.o_proj.weight"
    save_file({**weights, key: weights[key] * float("nan")}, model / WEIGHTS, {"format": "pt"})
    error = await refusal(model)
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert f"computes NaN or infinite logits in float32: {key} holds such values" in error.message
