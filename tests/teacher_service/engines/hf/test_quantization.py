"""Quantised teacher of the reference engine: transformers' own distributions, another fingerprint, and working adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, ScoreInput
from stillhouse.teacher_service.engines.hf.engine import HfEngine
from stillhouse.teacher_service.engines.hf.quantization import configuration
from tests.conftest import Models
from tests.teacher_service.calls import random_ids

IDS = random_ids(40)


def direct(models: Models, **options: Any) -> Any:
    """Logits of transformers for the same tokens, without Stillhouse."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        models.teacher,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**options) if options else None,
        device_map={"": "cpu"},
    ).eval()
    with torch.inference_mode():
        logits = model(torch.tensor(IDS[None].astype(np.int64))).logits[0]
    return logits.double().log_softmax(-1).numpy()[np.arange(len(IDS) - 1), IDS[1:]]


async def test_a_quantised_checkpoint_is_served_unchanged(models: Models, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shutil.copytree(models.teacher, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    quantised = AutoModelForCausalLM.from_pretrained(
        models.teacher,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cpu"},
    )
    quantised.save_pretrained(tmp_path / "model")
    engine = await HfEngine.load(TeacherConfig(model=str(tmp_path / "model"), threads=1))
    try:
        assert engine.info.quantization == "bitsandbytes"
        item = ScoreInput(token_ids=IDS, start=1, options=DistributionOptions(top_k=4))
        answer = (await engine.score(item)).target_logprobs
        assert np.abs(answer - direct(models, load_in_8bit=True)).mean() < 0.01
    finally:
        await engine.close()


@pytest.mark.parametrize(
    ("asked", "reported", "options"),
    [
        ("nf4", "bitsandbytes_4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("int8", "bitsandbytes_8bit", {"load_in_8bit": True}),
    ],
)
async def test_a_quantised_teacher_scores_like_transformers(
    models: Models, asked: str, reported: str, options: dict[str, Any]
) -> None:
    plain = await HfEngine.load(TeacherConfig(model=str(models.teacher), threads=1))
    plain_print = plain.info.model_fingerprint
    await plain.close()
    engine = await HfEngine.load(TeacherConfig(model=str(models.teacher), quantization=asked, threads=1))
    try:
        assert engine.info.quantization == reported
        assert engine.info.model_fingerprint != plain_print
        item = ScoreInput(token_ids=IDS, start=1, options=DistributionOptions(top_k=4))
        answer = (await engine.score(item)).target_logprobs
        compute = {"bnb_4bit_compute_dtype": torch.float32} if asked == "nf4" else {}
        # On some CPUs bitsandbytes itself computes 4-bit matmuls in bfloat16, which the engine prevents.
        assert np.abs(answer - direct(models, **options, **compute)).mean() < 0.06
        assert np.abs(answer - direct(models)).max() > 0.1
        await engine.load_adapter("a", models.adapter_a)
        adapted = ScoreInput(token_ids=IDS, start=1, adapter="a", options=DistributionOptions(top_k=4))
        assert np.abs((await engine.score(adapted)).target_logprobs - answer).max() > 0.5
        assert np.array_equal((await engine.score(item)).target_logprobs, answer)
    finally:
        await engine.close()


@pytest.mark.parametrize(
    ("word", "name"), [("nf4", "bitsandbytes-4bit"), ("NF4", "bitsandbytes"), ("int8", "bitsandbytes_8bit")]
)
def test_words_of_run_files_are_the_methods_of_transformers(word: str, name: str) -> None:
    assert configuration(word, torch.float32).to_dict() == configuration(name, torch.float32).to_dict()
