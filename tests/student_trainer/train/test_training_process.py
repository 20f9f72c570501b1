"""The training process against a real teacher: what it learns, what it leaves behind, and how it is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.student_trainer.config.fields import Choices, fields_of
from stillhouse.student_trainer.config.schema import LossTermConfig
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from tests.conftest import Models
from tests.student_trainer.train.loss.dense_reference import dense_bucket_kl
from tests.student_trainer.train.runs import (
    events,
    failure,
    final_weights,
    metric,
    spec_of,
)
from tests.support.programs import Program

Run = Callable[[dict[str, Any]], RunDir]


def test_a_student_that_is_its_teacher_has_loss_zero(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    run_dir = run(
        spec_of(
            models.teacher,
            dataset_file,
            hf_teacher.target,
            optimizer={"learning_rate": 1e-12},
            loss={"sparse_target": "tail_bucket"},
        )
    )
    losses = metric(run_dir, "train/loss")
    assert sorted(losses) == list(range(1, 9))
    assert max(map(abs, losses.values())) < 1e-5
    assert abs(metric(run_dir, "eval/kl")[0]) < 1e-5
    assert metric(run_dir, "eval/agreement")[0] == 1


def test_a_noisy_student_has_the_loss_of_a_dense_computation(
    run: Run, models: Models, hf_teacher: Program, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = models.texts[0]
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(models.teacher)
    noisy = AutoModelForCausalLM.from_pretrained(models.teacher)
    with torch.no_grad():
        noisy.model.layers[0].mlp.down_proj.weight[0, 0] *= 1.01
        noisy.model.layers[1].self_attn.v_proj.weight.mul_(1.01)
    noisy.save_pretrained(tmp_path / "noisy")
    tokenizer.save_pretrained(tmp_path / "noisy")

    run_dir = run(
        spec_of(
            tmp_path / "noisy",
            data,
            hf_teacher.target,
            data={"eval_fraction": 0},
            loss={"top_k": 64, "sparse_target": "tail_bucket"},
        )
    )
    token_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    teacher = AutoModelForCausalLM.from_pretrained(models.teacher)
    with torch.no_grad():
        teacher_logits = teacher.double()(token_ids).logits[:, :-1]
        student_logits = noisy.double()(token_ids).logits[:, :-1]
    dense = dense_bucket_kl(teacher_logits, student_logits, 64).mean().item()
    assert dense > 1e-6
    assert metric(run_dir, "train/loss")[1] == pytest.approx(dense, abs=1e-5, rel=1e-3)


def test_tokens_are_weighed_by_the_entropy_that_the_teacher_tells(
    run: Run, models: Models, hf_teacher: Program, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text, top_k = models.texts[1], 2
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n")
    term = {"divergence": "forward_kl", "token_weighting": "teacher_entropy"}
    loss = {"top_k": top_k, "sparse_target": "tail_bucket", "terms": [term]}
    settings = {"eval_fraction": 0, "end_text": False}
    run_dir = run(spec_of(models.student, data, hf_teacher.target, data=settings, loss=loss))
    tokenizer = AutoTokenizer.from_pretrained(models.student)
    token_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        teacher_logits, student_logits = (
            AutoModelForCausalLM.from_pretrained(path).double()(token_ids).logits[:, :-1]
            for path in (models.teacher, models.student)
        )
    missing = teacher_logits.shape[-1] - student_logits.shape[-1]
    student_logits = torch.nn.functional.pad(student_logits, (0, missing), value=-math.inf)
    logprobs = teacher_logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    kl = dense_bucket_kl(teacher_logits, student_logits, top_k)
    expected = (entropy / entropy.mean() * kl).mean().item()
    assert abs(expected - kl.mean().item()) > 1e-3
    assert metric(run_dir, "train/loss")[1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.faults(row=18)
def test_a_run_whose_loss_is_no_number_fails_and_names_its_checkpoint(
    run: Callable[..., RunDir], models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    optimizer = {"learning_rate": 1e30, "name": "sgd", "warmup_fraction": 0, "max_grad_norm": 0}
    spec = spec_of(
        models.student, dataset_file, hf_teacher.target, optimizer=optimizer, checkpoint={"every_steps": 1}
    )
    run_dir = run(spec, code=EXIT_FAILED)
    assert "NaN or infinite in 3 steps in a row" in failure(run_dir)
    assert f"The last good checkpoint is that of step {run_dir.checkpoints()[-1]}." in failure(run_dir)
    assert "learning_rate" in failure(run_dir)


def test_distilling_brings_the_student_nearer(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    run_dir = run(spec_of(models.student, dataset_file, hf_teacher.target, optimizer={"epochs": 3}))
    kl = metric(run_dir, "eval/kl")
    total = events(run_dir, "started")[0]["total_steps"]
    assert kl[total] < kl[0]
    assert metric(run_dir, "teacher/sequences_asked")[total] == 3 * 58
    assert events(run_dir)[-1]["kind"] == "completed"
    assert (run_dir.final_path / "tokenizer.json").is_file()
    assert list(run_dir.tensorboard_path.glob("events.*"))


def test_the_final_model_is_the_trained_one(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    from transformers import AutoModelForCausalLM

    run_dir = run(spec_of(models.student, dataset_file, hf_teacher.target))
    loaded = AutoModelForCausalLM.from_pretrained(run_dir.final_path).state_dict()
    before = AutoModelForCausalLM.from_pretrained(models.student).state_dict()
    assert any(not np.array_equal(loaded[name], before[name]) for name in loaded)


@pytest.mark.parametrize("output", ["adapter", "merged", "both"])
def test_lora_runs_leave_what_output_says(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program, output: str
) -> None:
    student = {"model": str(models.student), "lora": {"rank": 4, "dropout": 0.1}, "output": output}
    run_dir = run(spec_of(models.student, dataset_file, hf_teacher.target, student=student))
    assert (run_dir.final_path / "model.safetensors").is_file() == (output != "adapter")
    adapter = run_dir.final_path / "adapter" if output == "both" else run_dir.final_path
    assert (adapter / "adapter_model.safetensors").is_file() == (output != "merged")
    if output == "adapter":
        settings = json.loads((adapter / "adapter_config.json").read_text())
        assert settings["r"] == 4
        assert "lm_head" not in settings["target_modules"]
    else:
        assert not any("lora" in name for name in final_weights(run_dir))


@pytest.mark.parametrize(
    "loss",
    [
        {"temperature": 2.0, "temperature_mode": "exact"},
        {"temperature": 2.0, "temperature_mode": "conditional"},
        {"hard_weight": 0.5, "reduction": "sequence_mean"},
        {"sparse_target": "sampled", "num_samples": 20, "top_k": 1},
        {"sparse_target": "top_k_and_sampled", "num_samples": 12, "top_k": 8},
        {"sparse_target": "sampled_tail", "top_k": 8, "temperature": 2.0, "temperature_mode": "exact"},
        {"sparse_target": "renormalise", "top_k": 8},
    ],
)
def test_losses_of_a_run_file(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program, loss: dict[str, Any]
) -> None:
    run_dir = run(
        spec_of(models.student, dataset_file, hf_teacher.target, loss=loss, optimizer={"max_steps": 3})
    )
    losses = metric(run_dir, "train/loss")
    assert len(losses) == 3
    soft, hard = metric(run_dir, "train/forward_kl"), metric(run_dir, "train/cross_entropy")
    # The metric is the divergence itself; the objective has it times T².
    scale = loss["temperature"] ** 2 if loss.get("temperature_mode") == "exact" else 1
    for step, value in losses.items():
        assert value == pytest.approx(scale * soft[step] + loss.get("hard_weight", 0) * hard[step], rel=1e-5)


def test_every_divergence_is_a_term_of_a_packed_run(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    names = fields_of(LossTermConfig)["divergence"].rule(Choices) or ()
    weights = {name: 0.1 * (number + 1) for number, name in enumerate(names)}
    terms = [{"divergence": name, "weight": weight} for name, weight in weights.items()]
    terms[0]["token_weighting"] = "teacher_entropy"
    loss = {"terms": terms, "temperature": 1.5}
    run_dir = run(
        spec_of(
            models.student,
            dataset_file,
            hf_teacher.target,
            loss=loss,
            data={"packing": True},
            optimizer={"max_steps": 2},
        )
    )
    parts = {name: metric(run_dir, f"train/{name}") for name in names}
    for step, value in metric(run_dir, "train/loss").items():
        assert value == pytest.approx(
            1.5**2 * sum(weights[name] * parts[name][step] for name in names), rel=1e-5
        )
        assert all(parts[name][step] > 0 for name in names)


def test_micro_batches_of_a_run_change_nothing(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    def losses(micro_batch_size: int) -> list[float]:
        sizes = {
            "micro_batch_size": micro_batch_size,
            "grad_accum_steps": 8 // micro_batch_size,
            "max_steps": 4,
        }
        run_dir = run(spec_of(models.student, dataset_file, hf_teacher.target, optimizer=sizes))
        return list(metric(run_dir, "train/loss").values())

    whole = losses(8)
    assert losses(1) == pytest.approx(whole, rel=1e-5)
    assert losses(4) == pytest.approx(whole, rel=1e-5)


def test_cross_entropy_alone_asks_no_teacher_while_training(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    loss = {"terms": [{"weight": 0}], "hard_weight": 1.0}
    run_dir = run(spec_of(models.student, dataset_file, hf_teacher.target, loss=loss))
    assert set(metric(run_dir, "teacher/sequences_asked").values()) == {0}
    assert 0 in metric(run_dir, "eval/kl")
    assert "train/forward_kl" not in str(run_dir.metrics_path.read_text())


def test_cross_entropy_without_any_teacher(run: Run, models: Models, dataset_file: Path) -> None:
    run_dir = run(
        spec_of(models.student, dataset_file, None, loss={"terms": [{"weight": 0}], "hard_weight": 1.0})
    )
    assert not metric(run_dir, "eval/kl")
    perplexity, entropy = metric(run_dir, "eval/perplexity"), metric(run_dir, "eval/cross_entropy")
    assert perplexity[0] == pytest.approx(math.exp(entropy[0]))


def test_gradient_checkpointing_and_bf16_train(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    student = {"model": str(models.student), "gradient_checkpointing": True, "from_config": True}
    run_dir = run(
        spec_of(
            models.student,
            dataset_file,
            hf_teacher.target,
            student=student,
            optimizer={"precision": "bf16", "max_steps": 2, "name": "sgd"},
        )
    )
    assert len(metric(run_dir, "train/loss")) == 2


def test_a_stopped_run_keeps_a_checkpoint(
    run: Callable[..., RunDir], models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    calls = 0

    def stopped() -> bool:
        nonlocal calls
        calls += 1
        return calls > 100

    spec = spec_of(models.student, dataset_file, hf_teacher.target, optimizer={"epochs": 500})
    run_dir = run(spec, stopped=stopped)
    last = events(run_dir)[-1]
    assert last["kind"] == "stopped"
    assert run_dir.checkpoints() == [last["step"]]
    assert not run_dir.final_path.exists()


@pytest.fixture
def refusals(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> dict[str, tuple[dict[str, Any], str, str]]:
    """Case to spec, reason and a part of the sentence."""
    data, target, folder = dataset_file, hf_teacher.target, tmp_path
    (folder / "long.jsonl").write_text(json.dumps({"text": "Ada has 3 apples. " * 300}) + "\n")
    bad_row = folder / "bad.jsonl"
    bad_row.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    return {
        "no model": (spec_of(folder / "nowhere", data, target), "MODEL_NOT_FOUND", "nowhere"),
        "no data": (
            spec_of(models.student, folder / "none.jsonl", target),
            "DATASET_NOT_FOUND",
            "none.jsonl",
        ),
        "bad row": (spec_of(models.student, bad_row, target), "DATASET_INVALID", "row 2, field completion"),
        "foreign tokenizer": (
            spec_of(models.foreign, data, target),
            "TOKENIZER_MISMATCH",
            "copy the teacher's",
        ),
        "too long": (
            spec_of(models.student, folder / "long.jsonl", target),
            "SEQUENCE_TOO_LONG",
            "Set data.max_sequence_tokens: 512",
        ),
        "no adapter": (
            spec_of(models.student, data, target, teachers=[{"targets": [target], "adapter": "nope"}]),
            "ADAPTER_NOT_FOUND",
            'no adapter "nope"',
        ),
        "no such layers": (
            spec_of(models.student, data, target, student={"lora": {"target_modules": ["zz"]}}),
            "INVALID_SPEC",
            "student.lora.target_modules",
        ),
        "fp16 on a CPU": (
            spec_of(models.student, data, target, optimizer={"precision": "fp16"}),
            "INVALID_SPEC",
            "use bf16 or fp32",
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        "no model",
        "no data",
        "bad row",
        "foreign tokenizer",
        "too long",
        "no adapter",
        "no such layers",
        "fp16 on a CPU",
    ],
)
def test_bad_runs_are_refused_before_a_step(
    run: Callable[..., RunDir], refusals: dict[str, tuple[dict[str, Any], str, str]], case: str
) -> None:
    spec, reason, sentence = refusals[case]
    run_dir = run(spec, code=EXIT_FAILED)
    assert sentence in failure(run_dir)
    assert reason in json.dumps(events(run_dir, "failed"))
    assert not run_dir.metrics_path.read_text()
