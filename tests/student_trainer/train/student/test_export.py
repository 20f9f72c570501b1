"""Exports: each model that a run leaves computes what was trained, can be loaded, and never costs the trained weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import LoraConfig, StudentConfig
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.train.student.export import export, try_export
from stillhouse.student_trainer.train.student.loading import load_model
from stillhouse.student_trainer.train.student.saving import save_model, unchanged_names
from stillhouse.student_trainer.train.student.student import Student, load_tokenizer
from tests.conftest import Models
from tests.student_trainer.train.runs import events, failure, finish_here, make_run, metric, spec_of
from tests.student_trainer.train.student.tiny_architectures import tiny_model

IDS = torch.arange(5, 25)[None]
CPU = torch.device("cpu")


@pytest.fixture
def make_student(models: Models, tmp_path: Path) -> Callable[..., Student]:
    """Loads a student whose trained weights are random, as after some steps."""

    def make(**settings: Any) -> Student:
        config = StudentConfig(**{"model": str(models.student), **settings})
        tokenizer = load_tokenizer(config, tmp_path)
        student = Student.load(config, tokenizer, data_dir=tmp_path, device=CPU, precision="fp32", seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for each in student.trainable_parameters().values():
                each.add_(torch.randn(each.shape, generator=generator) * 0.05)
        return student

    return make


@pytest.fixture
def export_of(tmp_path: Path) -> Callable[[Student], Path]:
    """Exports a student and returns its directory."""

    def make(student: Student) -> Path:
        run_dir = _run_dir(tmp_path)
        run_dir.write_control(1, stop=False)
        with run_dir.open_attempt(1) as attempt:
            try_export(student, run_dir)
            return export(student, attempt)

    return make


def _run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir(exist_ok=True)
    return run_dir


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(IDS).logits
    return logits


def _loaded(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not found["missing_keys"]
    return model


ADAPTERS = (
    {"target_modules": ("lm_head",)},
    {"target_modules": ("embed_tokens",)},
    {"target_modules": ("embed_tokens", "lm_head", "q_proj")},
    {"bias": "all"},
)


@pytest.mark.parametrize("lora", ADAPTERS, ids=str)
@pytest.mark.parametrize("output", ["both", "adapter"])
@pytest.mark.filterwarnings(
    "ignore:.*(tie_word_embeddings|tied layer):UserWarning"
)  # of PEFT, about any such adapter
def test_an_adapter_on_one_of_two_tied_ends_is_exported_as_it_was_trained(
    models: Models,
    make_student: Callable[..., Student],
    export_of: Callable[[Student], Path],
    lora: dict[str, Any],
    output: str,
) -> None:
    from peft import PeftModel

    student = make_student(lora=LoraConfig(rank=4, **lora), output=output)
    expected = _logits(student.model)
    final = export_of(student)
    adapter = final / "adapter" if output == "both" else final
    adapted = PeftModel.from_pretrained(_loaded(models.student), adapter)
    torch.testing.assert_close(_logits(adapted), expected, rtol=1e-4, atol=1e-4)
    if output == "both":
        torch.testing.assert_close(_logits(_loaded(final)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"keep_layers": (1,)}, {"from_config": True}])
def test_an_adapter_whose_base_is_nowhere_else_has_it_beside_it(
    models: Models,
    make_student: Callable[..., Student],
    export_of: Callable[[Student], Path],
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel

    student = make_student(model=str(models.teacher), lora=LoraConfig(rank=4), output="adapter", **settings)
    expected = _logits(student.model)
    final = export_of(student)
    load_tokenizer(replace(student.config, model=str(final / "base")), student.data_dir)
    for adapted in (
        PeftModel.from_pretrained(_loaded(final / "base"), final),
        AutoPeftModelForCausalLM.from_pretrained(final),
        _loaded(final),
    ):
        torch.testing.assert_close(_logits(adapted), expected, rtol=1e-4, atol=1e-4)
    # As its card says for a directory that was moved by other means.
    moved = final.rename(tmp_path / "moved")
    card = (moved / "README.md").read_text()
    assert "base_model:" not in card
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("DIR/base"), "DIR")' in card
    adapted = PeftModel.from_pretrained(_loaded(moved / "base"), moved)
    torch.testing.assert_close(_logits(adapted), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_trained_further_on_the_base_beside_it_and_no_other(
    models: Models, make_student: Callable[..., Student], export_of: Callable[[Student], Path]
) -> None:
    cut: dict[str, Any] = {"model": str(models.teacher), "keep_layers": (1,)}
    student = make_student(**cut, lora=LoraConfig(rank=4), output="adapter")
    expected, final = _logits(student.model), export_of(student)

    def loaded(**settings: Any) -> Any:
        config = StudentConfig(**settings, adapter=str(final))
        return load_model(config, student.data_dir, torch.float32, CPU)

    for settings in ({"model": str(final / "base")}, cut):
        torch.testing.assert_close(_logits(loaded(**settings)), expected, rtol=1e-4, atol=1e-4)
    for settings in (
        {"model": str(models.teacher)},
        {**cut, "keep_layers": (0,)},
        {**cut, "from_config": True},
    ):
        with pytest.raises(
            StillhouseError, match=rf"has other weights than the base .* Set student.model: {final}/base"
        ) as refused:
            loaded(**settings)
        assert refused.value.reason is Reason.INVALID_SPEC


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mixtral", "qwen2_moe"])
def test_a_saved_model_says_which_of_its_weights_are_stored_as_they_are(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    save_model(model, tmp_path)
    stored, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    names = unchanged_names(model)
    assert all(torch.equal(stored[name], state[name]) for name in names)
    assert "model.norm.weight" in names or "transformer.ln_f.weight" in names
    assert any(".experts." in name for name in state.keys() - names) == ("mix" in kind or "moe" in kind)
    torch.testing.assert_close(_logits(_loaded(tmp_path)), _logits(model))


SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.9, "top_p": 0.6},
    {"temperature": 0.0},
    {"do_sample": False, "top_k": 20},
    {"min_p": 0.1},
    {"typical_p": 0.9},
    {"epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    {"early_stopping": True, "num_beams": 1},
    {"length_penalty": 2.0},
    {"pad_token_id": -1},
    {"return_dict_in_generate": False, "output_scores": True},
    {"max_new_tokens": 5, "eos_token_id": [1, 2]},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=json.dumps)
def test_generation_settings_that_load_are_exported_as_they_are(
    models: Models,
    make_student: Callable[..., Student],
    export_of: Callable[[Student], Path],
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    from transformers import GenerationConfig

    model = tmp_path / "model"
    shutil.copytree(models.student, model)
    (model / "generation_config.json").write_text(json.dumps(settings))
    final = export_of(make_student(model=str(model)))
    _loaded(final)
    found = GenerationConfig.from_pretrained(final).to_dict()
    assert {name: found[name] for name in settings} == settings


def test_settings_of_generation_in_the_model_configuration_are_exported_too(
    models: Models, make_student: Callable[..., Student], export_of: Callable[[Student], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(models.student, model)
    (model / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps(config | {"temperature": 0.9, "top_p": 0.6}))
    assert _loaded(export_of(make_student(model=str(model)))).generation_config.temperature == 0.9


def test_what_cannot_be_written_is_refused_before_the_first_step(
    make_student: Callable[..., Student], tmp_path: Path
) -> None:
    student = make_student()
    student.plain.config.odd = object()  # no JSON
    with pytest.raises(StillhouseError, match="could not be exported after training"):
        try_export(student, _run_dir(tmp_path))
    assert not list((tmp_path / "run").iterdir())


def test_an_export_that_differs_is_refused_and_removes_nothing(
    make_student: Callable[..., Student], export_of: Callable[[Student], Path], tmp_path: Path
) -> None:
    kept = export_of(make_student()) / "config.json"
    student = make_student()
    student.plain.config.rms_norm_eps = 0.5  # a setting that the layers were not built with
    with pytest.raises(StillhouseError, match=r"differs from the trained student") as raised:
        export_of(student)
    assert raised.value.reason is Reason.EXPORT_FAILED
    assert kept.is_file()
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("student", [{}, {"lora": {"rank": 2}, "output": "merged"}])
def test_a_failed_export_leaves_a_loadable_checkpoint_and_is_done_again_without_data_or_steps(
    models: Models, dataset_file: Path, tmp_path: Path, student: dict[str, Any]
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    data = tmp_path / "data.jsonl"
    data.write_text("".join(dataset_file.read_text().splitlines(keepends=True)[:16]))
    spec = spec_of(
        models.student,
        data,
        None,
        student={"model": str(models.student), **student},
        loss={"terms": [{"weight": 0}], "hard_weight": 1},
        data={"eval_fraction": 0},
        optimizer={"max_steps": 2},
    )
    run_dir = make_run(tmp_path, "run", spec)
    run_dir.final_path.write_bytes(b"in the way of the export")
    assert finish_here(run_dir) == EXIT_FAILED
    assert run_dir.checkpoints() == [2]
    path = run_dir.checkpoint_path(2)
    left = AutoPeftModelForCausalLM.from_pretrained(path) if student else _loaded(path)
    assert AutoTokenizer.from_pretrained(path).chat_template

    ends = run_dir.trained()
    assert ends is not None
    run_dir.trained_path.write_text(
        json.dumps({"step": 2, "end_ids": [*ends.end_ids, 7]})
    )  # as the data may add
    run_dir.final_path.unlink()
    data.unlink()
    assert finish_here(run_dir, 2) == 0, failure(run_dir)
    assert [each["step"] for each in events(run_dir, "started")] == [0, 2]
    assert len(metric(run_dir, "train/loss")) == 2
    final = _loaded(run_dir.final_path)
    assert 7 in final.generation_config.eos_token_id
    torch.testing.assert_close(_logits(final), _logits(left), rtol=1e-4, atol=1e-4)
