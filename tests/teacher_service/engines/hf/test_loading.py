"""Models whose weights are not all in their files, or whose memory transformers would lose: refused by name, or computed
as by whole passes in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engines.hf.model import HfModel
from stillhouse.teacher_service.models.tokenizer import eos_token_ids
from stillhouse.teacher_service.models.weight_names import check_weight_names
from tests.support.small_models import TINY_SIZES

LAYER = "model.layers.1.self_attn."


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """An untied model with biases."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY_SIZES, tie_word_embeddings=False))
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.1
    return save(model, tmp_path / "model")


def change(directory: Path, weights: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / "model.safetensors"
    save_file(weights(load_file(path)), path, metadata={"format": "pt"})


def load(directory: Path, dtype: str = "float32") -> HfModel:
    return HfModel.load(TeacherConfig(model=str(directory), engine="hf", dtype=dtype), directory)


def logits(model: HfModel) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.model(torch.arange(2, 12).unsqueeze(0)).logits
    return result


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("k_proj.weight", f"{LAYER}k_proj.weight"),
        ("q_proj.bias", f"{LAYER}q_proj.bias"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "tie_word_embeddings"),
    ],
)
def test_a_lost_weight_is_named(qwen: Path, lost: str, named: str) -> None:
    change(qwen, lambda weights: {key: each for key, each in weights.items() if not key.endswith(lost)})
    with pytest.raises(StillhouseError, match=named) as refused:
        load(qwen)
    assert refused.value.reason == Reason.MODEL_NOT_FOUND


def test_a_weight_that_is_not_a_number_is_named_and_the_model_not_taken_for_an_encoder(qwen: Path) -> None:
    key = f"{LAYER}o_proj.weight"
    change(qwen, lambda weights: {**weights, key: weights[key] * float("nan")})
    with pytest.raises(StillhouseError, match=rf"NaN or infinite logits in float32: {key} holds") as refused:
        load(qwen)
    assert refused.value.reason == Reason.MODEL_NOT_FOUND


def test_a_renamed_weight_is_named_with_its_new_name(qwen: Path) -> None:
    change(qwen, lambda weights: {key.replace("k_proj", "key"): each for key, each in weights.items()})
    with pytest.raises(StillhouseError, match=r"k_proj.*self_attn\.key\.") as refused:
        load(qwen)
    assert refused.value.reason == Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
        lambda key: f"student.net.{key}",
    ],
)
def test_a_pure_prefix_is_read_without_it(qwen: Path, rename: Callable[[str], str]) -> None:
    wanted = logits(load(qwen))
    change(qwen, lambda weights: {rename(key): each for key, each in weights.items()})
    with capture_logs() as logs:
        assert torch.equal(logits(load(qwen, "auto")), wanted)
    assert "without their prefix" in str(logs)


def test_a_bias_that_the_configuration_leaves_out_is_named(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**TINY_SIZES, attention_bias=True)
    model = transformers.LlamaForCausalLM(config)
    directory = save(model, tmp_path / "model")
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "attention_bias": False}))
    load(directory)  # its biases are zero
    change(directory, lambda weights: {key: each + 0.1 for key, each in weights.items()})
    with pytest.raises(StillhouseError, match=r"q_proj\.bias.*attention_bias"):
        load(directory)


def test_a_tensor_of_another_shape_is_named_with_both(qwen: Path) -> None:
    key = f"{LAYER}o_proj.weight"
    change(qwen, lambda weights: {**weights, key: weights[key][:9]})
    with pytest.raises(
        StillhouseError, match=rf"{key} as \[9, 32\], and its config.json makes it \[32, 32\]"
    ):
        load(qwen)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_stand_for_others_are_refused(qwen: Path, dtype: torch.dtype) -> None:
    key = f"{LAYER}o_proj.weight"
    change(qwen, lambda weights: {**weights, key: weights[key].to(dtype)})
    with pytest.raises(StillhouseError, match=rf"{key}.* no quantization_config"):
        load(qwen)


def test_scales_that_a_quantised_checkpoint_lacks_are_named(qwen: Path) -> None:
    config = json.loads((qwen / "config.json").read_text())
    packed = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
    }
    (qwen / "config.json").write_text(json.dumps({**config, "quantization_config": packed}))
    with pytest.raises(StillhouseError, match=r"weight_scale.* in its files, which would be random numbers"):
        load(qwen)


def test_an_index_names_files_of_the_directory_alone(qwen: Path) -> None:
    names = list(load_file(qwen / "model.safetensors"))
    (qwen / "model.safetensors").rename(qwen.parent / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../other.safetensors")}
    (qwen / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StillhouseError, match=r"names \.\./other.safetensors, outside of the directory"):
        load(qwen)


def test_code_of_a_model_is_not_offered_to_the_operator(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return "n"

    code = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}
    (qwen / "config.json").write_text(json.dumps({**code, "eos_token_id": 3}))
    (qwen / "configuration_own.py").write_text("raise SystemExit\n")
    monkeypatch.setattr("builtins.input", answer)
    eos_token_ids(qwen)
    assert not asked


def test_an_embedded_adapter_is_refused(qwen: Path) -> None:
    (qwen / "adapter_config.json").write_text("{}")
    with pytest.raises(StillhouseError, match="--adapter"):
        load(qwen)


def test_a_missing_shard_is_named(qwen: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(qwen).save_pretrained(qwen, max_shard_size="20KB")
    (qwen / "model.safetensors").unlink()
    load(qwen)
    shard = sorted(qwen.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(StillhouseError, match=shard.name):
        load(qwen)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("BertForSequenceClassification", "cls.predictions"),
        ("BertForMaskedLM", "encoder"),
        ("Qwen2ForSequenceClassification", "lm_head"),
    ],
)
def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path, kind: str, named: str) -> None:
    config_type = transformers.BertConfig if kind.startswith("Bert") else transformers.Qwen2Config
    extra = {} if kind.startswith("Bert") else {"tie_word_embeddings": False, "pad_token_id": 0}
    config = config_type(**{**TINY_SIZES, **extra})
    with pytest.raises(StillhouseError, match=named) as refused:
        load(save(getattr(transformers, kind)(config), tmp_path / "model"))
    assert refused.value.reason == Reason.MODEL_NOT_FOUND


MAMBA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "initializer_range": 0.5,
}
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("cache_params", MAMBA),
    "Mamba2": ("cache_params", {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1}),
    "Rwkv": (
        "state",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    ),
    "RecurrentGemma": (
        "",
        {**TINY_SIZES, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    ),
    "Qwen2": ("past_key_values", dict(TINY_SIZES)),
    "MiniMax": (
        "",
        {
            **TINY_SIZES,
            "num_local_experts": 2,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "OpenAIGPT": ("", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
}


@pytest.mark.parametrize("family", RECURRENT)
def test_samples_in_turns_are_those_of_whole_passes(family: str) -> None:
    name, settings = RECURRENT[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**settings)
    kind = "OpenAIGPTLMHeadModel" if family == "OpenAIGPT" else f"{family}ForCausalLM"
    inner = getattr(transformers, kind)(config).eval().requires_grad_(False)
    for weight in inner.parameters():
        weight.data += torch.randn_like(weight) * 0.1
    model = HfModel(inner, torch.device("cpu"))
    assert model.cache_name == name
    sequences = [np.arange(4, 4 + length, dtype=np.int32) for length in (12, 9)]
    caches = [model.new_cache() for _ in sequences]
    with torch.inference_mode():
        for end in range(3, 10):
            for ids, cache in zip(sequences, caches, strict=True):
                read = ids[:end] if end == 3 or cache is None else ids[end - 1 : end]
                found = model.head(model.last_rows([read], 1, cache)[0, 0])
                wanted = inner(torch.from_numpy(ids[None, :end]).long(), use_cache=False).logits[0, -1]
                assert torch.allclose(found.log_softmax(-1), wanted.log_softmax(-1), atol=1e-4)


def test_a_cap_on_logits_is_kept_where_a_probe_does_not_show_it() -> None:
    config = transformers.Gemma2Config(**{**TINY_SIZES, "initializer_range": 0.02}, head_dim=16)
    model = HfModel(transformers.Gemma2ForCausalLM(config).eval(), torch.device("cpu"))
    assert not model.splits


def test_a_residual_in_float32_ends_in_an_output_layer_of_another_type() -> None:
    inner = transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA)).to(torch.bfloat16).eval()
    model = HfModel(inner, torch.device("cpu"))
    ids = np.arange(3, 12, dtype=np.int32)
    with torch.inference_mode():
        found = model.head(model.last_rows([ids], 1)[0]).float()
        wanted = inner(torch.from_numpy(ids[None]).long(), use_cache=False).logits[0, -1:]
    assert model.cache_name == "cache_params"
    assert torch.equal(found, wanted)


def test_an_engine_that_goes_by_files_alone_refuses_what_transformers_repairs(qwen: Path) -> None:
    check_weight_names(qwen, "it").require_plain("it")
    config = json.loads((qwen / "config.json").read_text())
    (qwen / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(StillhouseError, match=r"lm_head\.weight.*tie_word_embeddings"):
        check_weight_names(qwen, "it").require_plain("it")
    assert load(qwen).model.lm_head.weight is not load(qwen).model.model.embed_tokens.weight
    change(qwen, lambda weights: {f"module.{key}": each for key, each in weights.items()})
    with pytest.raises(StillhouseError, match=r"module\..*--engine hf"):
        check_weight_names(qwen, "it").require_plain("it")


def test_plain_weights_that_are_said_to_be_quantised_are_refused(qwen: Path) -> None:
    config = json.loads((qwen / "config.json").read_text())
    declared = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (qwen / "config.json").write_text(json.dumps({**config, **declared}))
    with pytest.raises(StillhouseError, match=r'"bitsandbytes".*plain weights; take.*--quantization'):
        load(qwen)


@pytest.mark.parametrize("files", [1, 3])
def test_quantised_matrices_have_other_tensors_in_the_place_of_their_weight(qwen: Path, files: int) -> None:
    config = json.loads((qwen / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (qwen / "config.json").write_text(json.dumps({**config, **quantised}))
    change(
        qwen,
        lambda weights: {key.replace("proj.weight", "proj.qweight"): each for key, each in weights.items()},
    )
    if files > 1:
        weights = load_file(qwen / "model.safetensors")
        (qwen / "model.safetensors").unlink()
        names = {key: f"model-{number % files}.safetensors" for number, key in enumerate(weights)}
        for file in set(names.values()):
            save_file({key: weights[key] for key in names if names[key] == file}, qwen / file)
        (qwen / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert len(check_weight_names(qwen, "it").files) == files
    if files == 1:
        change(qwen, lambda weights: {key: each for key, each in weights.items() if "k_proj.q" not in key})
        with pytest.raises(StillhouseError, match=r"k_proj\.weight"):
            check_weight_names(qwen, "it")
