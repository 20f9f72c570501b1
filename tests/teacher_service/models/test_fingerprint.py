"""Fingerprints change with every weight and setting, and with nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.models.fingerprint import (
    adapter_fingerprint,
    cache_directory,
    file_sha256,
    model_fingerprint,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": "5.1"}))
    (directory / "a.safetensors").write_bytes(b"weights of a")
    (directory / "b.safetensors").write_bytes(b"weights of b")
    return directory


def fingerprint(directory: Path, dtype: str = "float32", quantization: str = "") -> str:
    return model_fingerprint(directory, dtype=dtype, quantization=quantization)


def test_a_copy_elsewhere_has_the_same_fingerprint(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps({"transformers_version": "9", "hidden_size": 8}, indent=2))
    (copy / "README.md").write_text("not a number")
    assert fingerprint(copy) == fingerprint(model)
    assert len(fingerprint(model)) == 64


def test_every_weight_and_setting_changes_the_fingerprint(model: Path) -> None:
    first = fingerprint(model)
    assert fingerprint(model, dtype="bfloat16") != first
    assert fingerprint(model, quantization="fp8") != first
    (model / "config.json").write_text(json.dumps({"hidden_size": 9}))
    second = fingerprint(model)
    assert second != first
    (model / "b.safetensors").write_bytes(b"weights of B")
    assert fingerprint(model) != second


def test_a_cached_digest_does_not_outlive_its_file(model: Path) -> None:
    path = model / "a.safetensors"
    os.utime(path, ns=(10**18, 10**18))
    digest = file_sha256(path)
    assert file_sha256(path) == digest
    assert len(list(cache_directory().iterdir())) == 1
    path.write_bytes(b"weights of A")
    assert file_sha256(path) != digest
    next(cache_directory().iterdir()).write_text("damaged")
    os.utime(path, ns=(10**18, 10**18))
    assert file_sha256(path) == file_sha256(path) != digest


def test_the_digest_of_a_fresh_file_is_not_cached(model: Path) -> None:
    file_sha256(model / "a.safetensors")
    assert not cache_directory().exists()


def test_an_unwritable_home_costs_only_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    os.utime(model / "a.safetensors", ns=(10**18, 10**18))
    assert fingerprint(model) == fingerprint(model)


def test_incomplete_models_are_named(model: Path, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (model / name).unlink()
    with pytest.raises(StillhouseError, match="holds no weights") as caught:
        fingerprint(model)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    with pytest.raises(StillhouseError, match=r"config\.json"):
        fingerprint(tmp_path / "nothing")
    (model / "config.json").write_text("{")
    with pytest.raises(StillhouseError, match="is not JSON"):
        fingerprint(model)


def test_adapters(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory, base in ((first, "/here/base"), (second, "/there/base")):
        directory.mkdir()
        config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": base}
        (directory / "adapter_config.json").write_text(json.dumps(config))
        (directory / "adapter_model.safetensors").write_bytes(b"weights")
    assert adapter_fingerprint(first) == adapter_fingerprint(second)
    (second / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    assert adapter_fingerprint(first) != adapter_fingerprint(second)
    (first / "adapter_model.safetensors").rename(first / "adapter_model.bin")
    with pytest.raises(StillhouseError, match="pickled weights are not read") as caught:
        adapter_fingerprint(first)
    assert caught.value.reason is Reason.ADAPTER_INVALID
