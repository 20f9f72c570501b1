"""Adapters of every configuration in one model: each computes as peft does with a base of its own, and base and other
adapters keep their bits while it is loaded, after it is refused and after it is unloaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.engines.hf.adapters import LoraSlots
from stillhouse.teacher_service.models.adapter_files import check_ranks
from tests.conftest import Models
from tests.support.small_models import TINY_SIZES

IDS = torch.arange(3, 15).unsqueeze(0)
GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
LLAMA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
MOE_PLAIN: dict[str, Any] = {"target_modules": ["q_proj"]}
MOE = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}

SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen2", LLAMA),
    "bias of its modules": ("qwen2", {**LLAMA, "bias": "lora_only"}),
    "all biases": ("qwen2", {**LLAMA, "bias": "all"}),
    "bias of its Conv1D modules": ("gpt2", {**GPT2, "bias": "lora_only"}),
    "all biases, also of norms": ("gpt2", {**GPT2, "bias": "all"}),
    "bias of its own": ("qwen2", {**LLAMA, "lora_bias": True}),
    "DoRA": ("qwen2", {**LLAMA, "use_dora": True}),
    "DoRA on Conv1D with bias": ("gpt2", {**GPT2, "use_dora": True, "bias": "lora_only"}),
    "rsLoRA": ("qwen2", {**LLAMA, "use_rslora": True}),
    "patterns": ("qwen2", {**LLAMA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "some layers": ("qwen2", {**LLAMA, "layers_to_transform": [1]}),
    "all linear": ("qwen2", {"target_modules": "all-linear"}),
    "embedding and head": ("untied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied embedding": ("qwen2", {"target_modules": ["embed_tokens"]}),
    "tied head": ("qwen2", {"target_modules": ["lm_head"]}),
    "saved head": ("untied", {**LLAMA, "modules_to_save": ["lm_head"]}),
    "saved tied head": ("qwen2", {**LLAMA, "modules_to_save": ["lm_head"]}),
    "saved norm, with biases": ("gpt2", {**GPT2, "modules_to_save": ["ln_f"], "bias": "lora_only"}),
    "saved embedding and head": ("untied", {**LLAMA, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "new tokens": ("untied", {**LLAMA, "trainable_token_indices": [4, 9]}),
    "new tokens at tied ends": ("qwen2", {**LLAMA, "trainable_token_indices": [9, 4]}),
    "new tokens by name": ("untied", {**LLAMA, "trainable_token_indices": {"lm_head": [7, 2]}}),
    "parameters of experts": ("moe", MOE),
}
WITHOUT_ADAPTERS = """
import asyncio, sys
import numpy as np
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, ScoreInput
from stillhouse.teacher_service.engines.hf.engine import HfEngine

async def score():
    engine = await HfEngine.load(TeacherConfig(model=sys.argv[1], engine="hf"))
    item = ScoreInput(token_ids=np.array([1, 2], np.int32), start=1, options=DistributionOptions(top_k=1))
    await engine.score(item)
    await engine.close()

asyncio.run(score())
sys.exit("peft" in sys.modules)
"""
REFUSED: dict[str, dict[str, Any]] = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "repeated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "a field of another version": {"use_later_lora": True},
    "text for a switch": {"use_rslora": "false"},
    "text for a number": {"lora_alpha": "8"},
    "no number": {"lora_alpha": float("nan")},
    "no number in a pattern": {"alpha_pattern": {"q_proj": "4"}},
    "an unknown bias": {"bias": "some"},
    "invocation tokens": {"alora_invocation_tokens": [5, 6]},
}


def make_base(kind: str) -> Any:
    """A small model with random weights, of which biases and norms are random too."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: Any
        if kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32))
        elif kind == "moe":
            model = Qwen3MoeForCausalLM(
                Qwen3MoeConfig(
                    **TINY_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16
                )
            )
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**TINY_SIZES, tie_word_embeddings=kind == "qwen2"))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1:
                    weight.add_(torch.randn_like(weight) * 0.2)
                assert name
    return model.eval().requires_grad_(False)


def make_adapter(directory: Path, kind: str, seed: int, change: dict[str, Any]) -> Path:
    """An adapter that peft saved, every weight that it trains moved away from its first value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            make_base(kind), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **change)
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in adapted.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
        adapted.save_pretrained(directory)
    return directory


def wanted_logits(kind: str, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(make_base(kind), adapter).eval())


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits
    return result


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", ""): weight.clone()
        for name, weight in model.state_dict().items()
        if "lora_" not in name
    }


class Watched:
    """A model whose base and first adapter must not change."""

    def __init__(self, kind: str, first: Path) -> None:
        self.model = make_base(kind)
        self.slots = LoraSlots(self.model, max_adapters=3, max_rank=16)
        self.base, self.bits = logits(self.model), bits(self.model)
        self.slots.load("first", first)
        assert torch.equal(self.speak(""), self.base)
        self.first = self.speak("first")
        assert not torch.equal(self.first, self.base)
        self.check()

    def speak(self, name: str) -> torch.Tensor:
        self.slots.activate(name)
        return logits(self.model)

    def check(self) -> None:
        """Asserts that base and first adapter have the bits that they had."""
        for name in ("first", "", "first"):
            assert torch.equal(self.speak(name), self.first if name else self.base), name or "base"
        self.slots.activate("")
        now = bits(self.model)
        assert now.keys() == self.bits.keys()
        assert all(torch.equal(now[name], weight) for name, weight in self.bits.items())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], Path]:
    """Makes each adapter once."""
    found: dict[str, Path] = {}

    def make(kind: str, change: dict[str, Any]) -> Path:
        key = f"{kind} {change}"
        if key not in found:
            found[key] = make_adapter(tmp_path_factory.mktemp("adapter"), kind, 1 + len(found), change)
        return found[key]

    return make


def plain(kind: str) -> dict[str, Any]:
    return {"gpt2": GPT2, "moe": MOE_PLAIN, "qwen2": {"target_modules": ["q_proj", "embed_tokens"]}}.get(
        kind, LLAMA
    )


@pytest.mark.parametrize("name", SERVED)
def test_an_adapter_speaks_as_peft_does_and_leaves_the_others_as_they_were(
    name: str, made: Callable[[str, dict[str, Any]], Path]
) -> None:
    kind, change = SERVED[name]
    watched = Watched(kind, made(kind, plain(kind)))
    adapter = made(kind, change)
    wanted = wanted_logits(kind, adapter)
    for _ in range(2):  # again in the place of the unloaded one
        watched.slots.load("other", adapter)
        watched.check()
        assert torch.allclose(watched.speak("other"), wanted, atol=1e-5)
        assert not torch.allclose(watched.speak("other"), watched.base, atol=1e-2)
        watched.check()
        own = watched.speak("other")
        watched.slots.load("third", made(kind, {**plain(kind), "bias": "lora_only"}))
        assert torch.equal(watched.speak("other"), own)
        watched.slots.unload("third")
        watched.slots.unload("other")
        watched.check()
    watched.slots.unload("first")
    assert torch.equal(logits(watched.model), watched.base)
    assert not any("base_layer" in key for key in watched.model.state_dict())
    watched.slots.load("other", adapter)
    if change.get("lora_bias"):
        with pytest.raises(StillhouseError, match=r"cannot be merged.*no bias"):
            watched.slots.merge("other")
    elif "tied" not in name:  # which merging cannot keep apart
        watched.slots.merge("other")
        assert torch.allclose(logits(watched.model), wanted, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_kind_is_named_and_later_adapters_load(
    name: str, made: Callable[[str, dict[str, Any]], Path], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(made("qwen2", LLAMA), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **REFUSED[name]}))
    watched = Watched("qwen2", made("qwen2", LLAMA))
    with pytest.raises(StillhouseError, match=next(iter(REFUSED[name]))) as refused:
        watched.slots.load("other", adapter)
    assert refused.value.reason == Reason.ADAPTER_INVALID
    watched.check()
    watched.slots.load("later", made("qwen2", {**LLAMA, "bias": "all"}))
    watched.check()


@pytest.mark.parametrize(
    ("change", "drop", "why"),
    [
        ({"bias": "lora_only"}, "bias", "q_proj.bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head", "lm_head.weight"),
        ({"trainable_token_indices": [4, 9]}, "trainable_tokens", "embed_tokens"),
        ({}, "lora_B", "lora_B"),
        ({}, "+model.norm.strange", "norm.strange"),
        ({}, "+model.layers.0.self_attn.q_proj.weight", "q_proj.weight"),
    ],
)
def test_a_file_that_lacks_weights_or_has_others_is_refused_by_name(
    made: Callable[[str, dict[str, Any]], Path], tmp_path: Path, change: dict[str, Any], drop: str, why: str
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(made("untied", {**LLAMA, **change}), adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    if drop.startswith("+"):
        weights["base_model.model." + drop[1:]] = torch.ones(7)
    else:
        weights = {key: weight for key, weight in weights.items() if drop not in key or "o_proj" in key}
    save_file(weights, adapter / "adapter_model.safetensors")
    watched = Watched("untied", made("untied", LLAMA))
    with pytest.raises(StillhouseError, match=why) as refused:
        watched.slots.load("other", adapter)
    assert refused.value.reason == Reason.ADAPTER_INVALID
    watched.check()
    watched.slots.load("later", made("untied", LLAMA))
    watched.check()


def test_weights_that_stand_for_others_are_refused_by_type(
    made: Callable[[str, dict[str, Any]], Path], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(made("qwen2", LLAMA), adapter)
    check_ranks("it", adapter)
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    for dtype, named in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        save_file({key: each.to(dtype) for key, each in weights.items()}, path)
        with pytest.raises(StillhouseError, match=f"lora_A.weight is of type {named}; save it in float32"):
            check_ranks("it", adapter)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(StillhouseError, match=r"of 70 bytes, cannot be read .*; fetch or save it again"):
        check_ranks("it", adapter)


@pytest.mark.model
@pytest.mark.slow
def test_peft_is_not_imported_before_the_first_adapter(models: Models) -> None:
    program = [sys.executable, "-c", WITHOUT_ADAPTERS, str(models.teacher)]
    assert subprocess.run(program, check=False, capture_output=True).returncode == 0
