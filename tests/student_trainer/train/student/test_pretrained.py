"""Models that are loaded whole or refused: no weight is random without a word."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.train.student.loading import load_base
from stillhouse.student_trainer.train.student.pretrained import (
    UnfitModelError,
    check_causal,
    load_pretrained,
)
from stillhouse.student_trainer.train.student.saving import save_model
from tests.student_trainer.train.student.tiny_architectures import tiny_model

Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
LOST = "model.layers.1.mlp.up_proj.weight"


def _saved(directory: Path, change: Change, kind: str = "qwen2", **settings: Any) -> Any:
    """Saves a tiny model, with its weights changed; returns the model."""
    model = tiny_model(kind, **settings)
    model.save_pretrained(directory)
    path = directory / "model.safetensors"
    save_file(dict(change(load_file(path))), path, metadata={"format": "pt"})
    return model


def _renamed(pattern: str, by: str) -> Change:
    return lambda weights: {re.sub(pattern, by, name): each for name, each in weights.items()}


INCOMPLETE: dict[str, tuple[Change, dict[str, Any], str]] = {
    "lost": (lambda weights: {name: weights[name] for name in weights.keys() - {LOST}}, {}, LOST),
    "untied head": (
        lambda weights: {name: weights[name] for name in weights.keys() - {"lm_head.weight"}},
        {"tie_word_embeddings": False},
        "lm_head.weight",
    ),
    "renamed": (_renamed("up_proj", "upper"), {}, LOST.replace("1", "0")),
    "lost behind a prefix": (
        lambda weights: {f"module.{name}": weights[name] for name in weights.keys() - {LOST}},
        {},
        f"lacks one weight of a Qwen2ForCausalLM in its files ({LOST})",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_model_that_lacks_weights_is_refused_by_their_names(tmp_path: Path, case: str) -> None:
    change, settings, named = INCOMPLETE[case]
    _saved(tmp_path, change, **settings)
    with pytest.raises(UnfitModelError, match=re.escape(named)):
        load_pretrained(str(tmp_path))


def _set(directory: Path, name: str, content: Any) -> None:
    path = directory / name
    before = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps(before | content if isinstance(content, dict) else content))


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        (
            "config.json",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            'has a quantization_config of "bitsandbytes" in its config.json, and its files hold plain weights; take',
        ),
        (
            "generation_config.json",
            [{"eos_token_id": 1}],
            'has a generation_config.json that holds [{"eos_token_id": 1}], not an object of settings; save that file again, or',
        ),
        ("generation_config.json", None, "has a generation_config.json that holds null, not an object"),
    ],
)
def test_settings_that_mean_something_else_are_named_with_a_remedy(
    tmp_path: Path, name: str, content: Any, named: str
) -> None:
    _saved(tmp_path, dict)
    _set(tmp_path, name, content)
    with pytest.raises(StillhouseError, match=re.escape(named)) as caught:
        load_base(StudentConfig(model=str(tmp_path)), tmp_path, torch.float32)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from tests.student_trainer.train.student.tiny_architectures import tiny_config

    AutoModelForSequenceClassification.from_config(tiny_config("bert")).save_pretrained(tmp_path)
    with pytest.raises(UnfitModelError, match=r"cls\.predictions"):
        load_pretrained(str(tmp_path))


def test_an_encoder_with_all_its_weights_is_refused_too() -> None:
    check_causal(tiny_model("bert", is_decoder=True))
    with pytest.raises(UnfitModelError, match="later tokens"):
        check_causal(tiny_model("bert", is_decoder=False))


@pytest.mark.parametrize(
    ("pattern", "by"),
    [
        ("^", "module."),
        ("^", "_orig_mod."),
        ("^", "module._orig_mod."),
        ("^", "student.wrapped."),
        (r"layers\.(\d)\.", r"layers.\1._orig_mod."),
        (r"^model\.", "module."),
    ],
)
def test_a_pure_prefix_is_taken_off(tmp_path: Path, pattern: str, by: str) -> None:
    model = _saved(tmp_path / "wrapped", _renamed(pattern, by))
    found = load_pretrained(str(tmp_path / "wrapped"))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits)
    found.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "plain")
    names = [set(load_file(tmp_path / each / "model.safetensors")) for each in ("again", "plain")]
    assert names[0] == names[1]


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    _saved(
        tmp_path,
        lambda weights: {name: each[:90] if "embed" in name else each for name, each in weights.items()},
    )
    with pytest.raises(
        UnfitModelError, match=r"embed_tokens.weight as \[90, 32\], and its config.* it \[99, 32\]"
    ):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_stand_for_others_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    _saved(tmp_path, lambda weights: {**weights, LOST: weights[LOST].to(dtype)})
    with pytest.raises(UnfitModelError, match=rf"{LOST}.* no quantization_config"):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_bias_that_the_configuration_leaves_out_is_refused_unless_it_is_zero(
    tmp_path: Path, value: float
) -> None:
    bias = "model.layers.1.self_attn.o_proj.bias"
    _saved(tmp_path, lambda weights: {**weights, bias: torch.full((32,), value)}, "llama")
    if not value:
        load_pretrained(str(tmp_path))
        return
    with pytest.raises(UnfitModelError, match=f"has {bias} in its files.*attention_bias"):
        load_pretrained(str(tmp_path))


def test_an_output_layer_of_its_own_is_exported_untied(tmp_path: Path) -> None:
    own = torch.randn(99, 32, generator=torch.Generator().manual_seed(1))
    given = tmp_path / "given"
    _saved(given, lambda weights: {**weights, "lm_head.weight": own}, tie_word_embeddings=True)
    model = load_pretrained(str(given))
    assert torch.equal(model.get_output_embeddings().weight, own)
    save_model(model, tmp_path / "saved")
    # Engines that go by the configuration compute with the same output layer.
    assert not json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(load_file(tmp_path / "saved" / "model.safetensors")["lm_head.weight"], own)
