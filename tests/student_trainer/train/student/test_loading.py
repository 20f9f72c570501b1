"""Kinds of students: quantised under an adapter, cut down from a deeper model, resumed from an adapter; and an 8-bit optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.train.student.loading import load_base, load_model
from tests.conftest import Models
from tests.student_trainer.train.runs import (
    events,
    failure,
    final_weights,
    finish_here,
    make_run,
    metric,
    spec_of,
)
from tests.support.programs import Program

Run = Callable[..., RunDir]
OPTIMIZER = {"max_steps": 4, "grad_accum_steps": 1}


@pytest.fixture
def run(models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path) -> Run:
    """Trains this student in this process and returns its directory."""
    count = 0

    def train(
        student: dict[str, Any], *, code: int = 0, optimizer: dict[str, Any] | None = None, **further: Any
    ) -> RunDir:
        nonlocal count
        count += 1
        spec = spec_of(
            models.student,
            dataset_file,
            hf_teacher.target,
            student=student,
            optimizer=OPTIMIZER | (optimizer or {}),
            **further,
        )
        run_dir = make_run(tmp_path, f"run-{count}", spec)
        assert finish_here(run_dir) == code, events(run_dir)
        return run_dir

    return train


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_learns_through_its_adapter(
    run: Run, models: Models, quantization: str, dataset_file: Path, hf_teacher: Program
) -> None:
    student = {"model": str(models.student), "lora": {"rank": 4}, "quantization": quantization}
    run_dir = run(student)
    kl = metric(run_dir, "eval/kl")
    assert kl[4] < kl[0]
    assert (run_dir.final_path / "adapter" / "adapter_model.safetensors").is_file()
    # The merged model alone is as near to the teacher as the trained one.
    again = run({"model": str(run_dir.final_path)}, optimizer={"max_steps": 1})
    assert metric(again, "eval/kl")[0] == pytest.approx(kl[4], rel=0.05)


def test_a_quantised_run_resumes_bit_for_bit(run: Run, models: Models, tmp_path: Path) -> None:
    student = {"model": str(models.student), "lora": {"rank": 4}, "quantization": "nf4", "output": "adapter"}
    checkpoint = {"every_steps": 2, "keep": 5}
    whole = run(student, optimizer={"name": "adamw_8bit"}, checkpoint=checkpoint)
    spec = json.loads((whole.path / "spec.json").read_text())
    resumed = make_run(tmp_path, "resumed", spec)
    resumed.checkpoints_path.mkdir(parents=True, exist_ok=True)
    whole.checkpoint_path(2).rename(resumed.checkpoint_path(2))
    assert finish_here(resumed) == 0
    assert events(resumed, "started")[0]["step"] == 2
    files = [each.final_path / "adapter_model.safetensors" for each in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_continues_from_an_adapter(run: Run, models: Models) -> None:
    student = {"model": str(models.student), "lora": {"rank": 4}}
    first = run(student)
    second = run({"model": str(models.student), "adapter": str(first.final_path / "adapter")})
    assert metric(second, "eval/kl")[0] == pytest.approx(metric(first, "eval/kl")[4], rel=1e-4)
    settings = json.loads((second.final_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4
    refused = run(
        {"model": str(models.student), "adapter": str(models.texts and models.student)}, code=EXIT_FAILED
    )
    assert "no adapter_config.json" in failure(refused)


def test_only_the_chosen_modules_layers_and_biases_learn(models: Models) -> None:
    lora = {"rank": 2, "target_modules": ("v_proj",), "layers": (1,), "bias": "lora_only"}
    from stillhouse.student_trainer.config.schema import LoraConfig

    config = StudentConfig(model=str(models.teacher), lora=LoraConfig(**lora))  # type: ignore[arg-type]
    model = load_model(config, models.teacher, torch.float32, torch.device("cpu"))
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert len(trained) == 3
    assert all(".layers.1.self_attn.v_proj" in name for name in trained)
    assert sum("bias" in name for name in trained) == 1


def test_a_student_can_begin_as_some_layers_of_its_teacher(run: Run, models: Models) -> None:
    from transformers import AutoModelForCausalLM

    config = StudentConfig(model=str(models.teacher), keep_layers=(1,))
    model = load_model(config, models.teacher, torch.float32, torch.device("cpu"))
    whole = load_base(StudentConfig(model=str(models.teacher)), models.teacher, torch.float32)
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        hidden = whole.model.embed_tokens(ids)
        positions = torch.arange(20).unsqueeze(0)
        rotary = whole.model.rotary_emb(hidden, positions)
        mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
        hidden = whole.model.layers[1](hidden, attention_mask=mask, position_embeddings=rotary)
        expected = whole.lm_head(whole.model.norm(hidden))
        found = model(ids).logits
        written = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert written.shape[1] <= 23

    run_dir = run({"model": str(models.teacher), "keep_layers": [0]})
    saved = AutoModelForCausalLM.from_pretrained(run_dir.final_path)
    assert saved.config.num_hidden_layers == 1
    assert not any("layers.1." in name for name in final_weights(run_dir))
    assert "is not a layer of" in failure(
        run({"model": str(models.teacher), "keep_layers": [0, 7]}, code=EXIT_FAILED)
    )


def test_an_8_bit_optimizer_learns_nearly_as_the_other(run: Run, models: Models) -> None:
    student = {"model": str(models.student)}
    exact = metric(run(student, optimizer={"name": "adamw"}), "train/loss")
    eight = metric(run(student, optimizer={"name": "adamw_8bit"}), "train/loss")
    assert eight[1] == exact[1]
    np.testing.assert_allclose(list(eight.values()), list(exact.values()), rtol=0.02)
    assert eight[4] != exact[4]
    refused = run(student, optimizer={"name": "paged_adamw_8bit"}, code=EXIT_FAILED)
    assert 'use "adamw_8bit"' in failure(refused)
