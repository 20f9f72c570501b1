"""Weights by the headers of their files: whole models pass, and a lost tensor is named before a run is created."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.student_trainer.runs.api.weight_files import (
    INDEX,
    UNIFORM,
    WEIGHTS,
    WeightFilesError,
    check_weights,
)
from tests.conftest import Models
from tests.student_trainer.train.student.tiny_architectures import tiny_model

Weights = dict[str, torch.Tensor]


def rewrite(model: Path, change: Callable[[Weights], Weights]) -> None:
    """Replaces the tensors of a model's file."""
    save_file(change(load_file(model / WEIGHTS)), model / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("kind", sorted(UNIFORM))
def test_a_model_with_uniform_layers_misses_every_weight_of_them(tmp_path: Path, kind: str) -> None:
    model = tmp_path / "model"
    tiny_model(kind, tie_word_embeddings=False).save_pretrained(model)
    check_weights(model)
    whole = load_file(model / WEIGHTS)
    inner = [name for name in whole if ".layers.1." in name or ".h.1." in name]
    ends = [name for name in whole if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))]
    heads = [name for name in whole if name in ("lm_head.weight", "embed_out.weight")]
    assert len(inner) > 3
    assert len(ends) == 1
    assert len(heads) <= 1
    for lost in (*inner, *ends, *heads):
        save_file({name: each for name, each in whole.items() if name != lost}, model / WEIGHTS)
        if lost in heads and "tie_word_embeddings" not in (model / "config.json").read_text():
            continue  # its type unties them unsaid
        with pytest.raises(WeightFilesError, match="lacks weights in its files"):
            check_weights(model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._fsdp_wrapped_module."])
def test_names_that_a_run_repairs_pass(models: Models, tmp_path: Path, prefix: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(models.student, model)
    rewrite(
        model,
        lambda all_: {name if "layers.1" in name else f"{prefix}{name}": each for name, each in all_.items()},
    )
    check_weights(model)


def test_lost_layers_and_files_are_named(models: Models, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(models.student, model)
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1})
    )
    with pytest.raises(WeightFilesError, match=f"layer {config['num_hidden_layers']}: "):
        check_weights(model)
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**12}))
    with pytest.raises(WeightFilesError, match=r"and \d+ more"):
        check_weights(model)
    (model / "config.json").write_text(json.dumps({**config, "model_type": "of its own"}))
    rewrite(model, lambda all_: {name: each for name, each in all_.items() if "layers.1" not in name})
    check_weights(model)

    whole = load_file(model / WEIGHTS)
    places = dict.fromkeys(whole, "model-00001-of-00001.safetensors")
    (model / WEIGHTS).unlink()
    with pytest.raises(WeightFilesError, match=r"holds no weights as model\.safetensors"):
        check_weights(model)
    (model / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(WeightFilesError, match=r"lacks model-00001-of-00001\.safetensors, which its"):
        check_weights(model)
    save_file(whole, model / "model-00001-of-00001.safetensors")
    check_weights(model)
    name = next(iter(whole))
    save_file(
        {key: each for key, each in whole.items() if key != name}, model / "model-00001-of-00001.safetensors"
    )
    with pytest.raises(WeightFilesError, match=f"lacks {name}, which its"):
        check_weights(model)
    (model / "model-00001-of-00001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightFilesError, match=r"has an unreadable model-00001-of-00001\.safetensors"):
        check_weights(model)
    indices: list[Any] = [{"weight_map": {"a": "../../etc/passwd"}}, {"weight_map": ["a"]}, []]
    for index in indices:
        (model / INDEX).write_text(json.dumps(index))
        with pytest.raises(WeightFilesError, match="has an unreadable"):
            check_weights(model)
