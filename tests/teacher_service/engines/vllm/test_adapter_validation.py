"""Adapters that vLLM would apply in part, in silence: refused by name before they reach it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.engines.vllm.adapter_validation import check_weights
from stillhouse.teacher_service.models.adapter_files import check_config, check_matrices_only

PREFIX = "base_model.model."


@pytest.mark.parametrize(
    "change",
    [
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"lora_bias": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "loftq"},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"alora_invocation_tokens": [4]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_vllm_does_not_apply_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    for config in (plain, {**plain, **change}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with nullcontext() if config is plain else pytest.raises(StillhouseError) as refused:
            check_config("it", tmp_path, max_rank=8)
            check_matrices_only("it", tmp_path)
    assert refused is not None
    assert refused.value.reason is Reason.ADAPTER_INVALID
    assert next(iter(change)) in refused.value.message


def test_weights_that_replace_the_models_own_are_refused_unless_equal(tmp_path: Path) -> None:
    embedding = torch.arange(12.0).reshape(4, 3)
    base, adapter = tmp_path / "model.safetensors", tmp_path / "adapter_model.safetensors"
    save_file({"model.embed_tokens.weight": embedding.bfloat16()}, base)
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    for change, refused in ((0.0, False), (1.0, True)):
        save_file({key: embedding + change, f"{PREFIX}model.q_proj.lora_A.weight": torch.ones(2, 3)}, adapter)
        if refused:
            with pytest.raises(StillhouseError, match=r"embed_tokens.*LoRA matrices alone"):
                check_weights("it", adapter, {}, [base])
        else:
            check_weights("it", adapter, {}, [base])
