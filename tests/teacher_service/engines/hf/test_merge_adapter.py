"""merge-adapter, also as a process: the merged model scores like base plus adapter, and refusals are one sentence."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.protos.errors import StillhouseError
from stillhouse.teacher_service.engines.hf.merge_adapter import merge_adapter
from tests.conftest import Models
from tests.support.small_models import make_adapter
from tests.teacher_service.calls import random_ids, reference_logprobs


def merge(model: Path, adapter: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = ["merge-adapter", "--model", str(model), "--adapter", str(adapter), "--out", str(out)]
    return subprocess.run(
        [sys.executable, "-m", "stillhouse.teacher_service", *command],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_scores_like_base_plus_adapter(
    models: Models, tmp_path: Path, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(models.teacher, base)
    AutoModelForCausalLM.from_pretrained(models.teacher, dtype=dtype).save_pretrained(base)
    (base / "NOTICE.txt").write_text("kept")
    (base / "generation_config.json").write_text(
        '{"temperature": 0.9}'
    )  # loads, and save_pretrained refuses it
    out = tmp_path / "deep" / "merged"
    if dtype == torch.float32:
        merge_adapter(str(base), models.adapter_a, out)
    else:
        done = merge(base, models.adapter_a, out)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{out}: {base} with {models.adapter_a} merged"
    ids = random_ids(60)
    wanted = reference_logprobs(base, ids, models.adapter_a)
    # bfloat16 keeps 8 bits of every merged weight.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert np.abs(reference_logprobs(out, ids) - wanted).mean() < tolerance
    assert np.abs(reference_logprobs(base, ids) - wanted).mean() > 4 * tolerance
    assert {path.name for path in base.iterdir()} == {path.name for path in out.iterdir()}
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    merged, before = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {dtype}
    adapter = load_file(models.adapter_a / "adapter_model.safetensors")
    key = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{key}.lora_{side}.weight"] for side in "AB")
    assert torch.equal(merged[f"{key}.weight"], (before[f"{key}.weight"].float() + 2 * (b @ a)).to(dtype))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()


def test_a_refused_merge_has_a_reason_and_leaves_nothing(models: Models, tmp_path: Path) -> None:
    quantised = tmp_path / "quantised"
    shutil.copytree(models.teacher, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    misfit = make_adapter(tmp_path / "misfit", models.student, rank=4, seed=1)
    cut = tmp_path / "cut"
    shutil.copytree(models.adapter_a, cut)
    weights = load_file(cut / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), cut / "adapter_model.safetensors")
    partial = tmp_path / "partial"
    shutil.copytree(models.teacher, partial)
    weights = load_file(partial / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {name: weights[name] for name in weights.keys() - {lost}},
        partial / "model.safetensors",
        {"format": "pt"},
    )
    taken = tmp_path / "taken"
    taken.mkdir()
    out = tmp_path / "out"
    for model, adapter, to, part in (
        (quantised, models.adapter_a, out, "is quantised (gptq)"),
        (partial, models.adapter_a, out, f"lacks weights of a Qwen2ForCausalLM in its files ({lost})"),
        (models.teacher, misfit, out, "size mismatch"),
        (models.teacher, cut, out, "do not fit its configuration"),
        (models.teacher, models.teacher, out, "is not an adapter"),
        (tmp_path / "absent", models.adapter_a, out, "There is no"),
        (models.teacher, models.adapter_a, taken, "exists already"),
    ):
        with pytest.raises(StillhouseError, match=re.escape(part)):
            merge_adapter(str(model), adapter, to)
    done = merge(models.teacher, models.teacher, out)
    assert done.returncode == 2
    assert done.stderr.startswith("stillhouse-teacher merge-adapter: ")
    assert done.stderr.strip().count("\n") == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"quantised", "misfit", "cut", "partial", "taken"}


def test_an_adapter_is_merged_into_the_base_beside_it_or_a_copy(models: Models, tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "adapter" / "base"
    shutil.copytree(models.adapter_a, adapter)
    shutil.copytree(models.teacher, base)
    merge_adapter(str(base), adapter, tmp_path / "merged")
    merge_adapter(str(models.teacher), adapter, tmp_path / "of a copy")
    weights = load_file(base / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, base / "model.safetensors")
    with pytest.raises(StillhouseError, match=re.escape(f"other weights; give {base} as --model")):
        merge_adapter(str(models.teacher), adapter, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
