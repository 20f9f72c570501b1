"""Adapters: the layers that they reach, and those that they are refused for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.protos.errors import StillhouseError
from stillhouse.student_trainer.config.schema import LoraConfig, StudentConfig
from stillhouse.student_trainer.train.student.adapters import add_adapter, load_adapter, merge
from tests.student_trainer.train.student.tiny_architectures import tiny_model

RANK_2 = LoraConfig(rank=2)


def _adapted(model: Any) -> set[str]:
    """Returns the last names of modules that the adapter changes."""
    return {
        name.partition(".lora_")[0].rpartition(".")[2]
        for name, _ in model.named_parameters()
        if ".lora_" in name
    }


def test_all_linear_is_the_word_for_every_layer_but_the_output() -> None:
    default = add_adapter(tiny_model("qwen2"), RANK_2)
    named = add_adapter(tiny_model("qwen2"), replace(RANK_2, target_modules=("all-linear",)))
    assert _adapted(named) == _adapted(default) >= {"q_proj", "down_proj"}
    with_head = add_adapter(
        tiny_model("qwen2"), replace(RANK_2, target_modules=("all-linear", "embed_tokens"))
    )
    assert _adapted(with_head) == _adapted(default) | {"embed_tokens"}


def test_gpt2_has_linear_layers_of_another_type() -> None:
    assert _adapted(add_adapter(tiny_model("gpt2"), RANK_2)) == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"target_modules": ("q_proj", "query")}, "query: no module of this model matches"),
        ({"layers": (0, 7)}, "7: this model has 2 layers"),
        ({"target_modules": ("input_layernorm",)}, "no LoRA can be added there"),
    ],
)
def test_what_no_adapter_can_reach_is_refused_by_name(lora: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StillhouseError, match=sentence):
        add_adapter(tiny_model("qwen2"), replace(RANK_2, **lora))


def test_experts_that_an_adapter_leaves_are_said() -> None:
    with capture_logs() as logs:
        add_adapter(tiny_model("mixtral"), RANK_2)
    assert "experts_left_as_they_are" in str(logs)
    assert "gate_up_proj" in str(logs)


def test_layers_that_mamba_reads_past_are_left_and_said() -> None:
    with capture_logs() as logs:
        model = add_adapter(tiny_model("mamba"), RANK_2)
    assert _adapted(model) == {"in_proj", "x_proj", "dt_proj"}
    assert "'linear_left_as_they_are': 'out_proj'" in str(logs)


def test_an_architectures_own_linear_layers_are_reached_and_its_router_is_left() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    falcon = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes))
    assert _adapted(add_adapter(falcon, RANK_2)) >= {"query_key_value", "dense_4h_to_h"}
    assert _adapted(add_adapter(tiny_model("phimoe"), RANK_2)) == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_an_adapter_that_peft_puts_on_experts_is_merged(kind: str) -> None:
    """PEFT adapts the experts instead of layers that are named as the experts' former parts."""
    with capture_logs() as logs:
        model = add_adapter(tiny_model(kind), RANK_2)
    assert "experts_left_as_they_are" not in str(logs)
    assert "'linear_left_as_they_are': 'down_proj, gate_proj, up_proj'" in str(logs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.copy_(torch.randn(each.shape, generator=generator) * 0.1)
        ids = torch.arange(8)[None]
        expected = model.eval()(ids).logits
        torch.testing.assert_close(merge(model)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_lacks_tensors_is_refused_by_their_names(tmp_path: Path) -> None:
    add_adapter(tiny_model("qwen2"), RANK_2).save_pretrained(tmp_path)
    config = StudentConfig(model="tiny", adapter=str(tmp_path))
    load_adapter(tiny_model("qwen2"), config, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if "layers.1" in name and "lora_B" in name)
    save_file({name: weights[name] for name in weights.keys() - {lost}}, path)
    with pytest.raises(StillhouseError, match=lost.replace(".", r"\.")):
        load_adapter(tiny_model("qwen2"), config, tmp_path)


def _changed(directory: Path, settings: dict[str, Any]) -> StudentConfig:
    add_adapter(tiny_model("qwen2"), RANK_2).save_pretrained(directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return StudentConfig(model="tiny", adapter=str(directory))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA is taken"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga': it was trained on a changed base. Convert it"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': it was trained on a changed base"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; it must be a finite number"),
        (
            {"use_later_lora": True},
            "use_later_lora is True, which the installed version of peft does not know",
        ),
        ({"target_modules": ["q_proj"]}, "tensors that its configuration does not name for tiny"),
    ],
)
def test_an_adapter_that_would_be_computed_otherwise_is_refused(
    tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    config = _changed(tmp_path, settings)
    with pytest.raises(StillhouseError, match=re.escape(sentence)):
        load_adapter(tiny_model("qwen2"), config, tmp_path)


def test_an_adapter_of_integers_is_refused(tmp_path: Path) -> None:
    config = _changed(tmp_path, {})
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: each.to(torch.int8) for name, each in load_file(path).items()}, path)
    with pytest.raises(StillhouseError, match=r"in type I8\. Save it in float32"):
        load_adapter(tiny_model("qwen2"), config, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_of_a_changed_base_is_trained_further_on_that_base(tmp_path: Path, init: str) -> None:
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny_model("qwen2"), settings)
    with torch.no_grad():
        for each in adapted.parameters():
            if each.requires_grad:
                each.add_(0.1)
        expected = adapted.eval()(torch.arange(8)[None]).logits
    adapted.save_pretrained(tmp_path)
    config = StudentConfig(model="tiny", adapter=str(tmp_path))
    found = load_adapter(tiny_model("qwen2"), config, tmp_path).eval()
    torch.testing.assert_close(found(torch.arange(8)[None]).logits, expected, rtol=1e-4, atol=1e-4)
