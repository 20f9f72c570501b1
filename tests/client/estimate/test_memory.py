"""Predicted memory against measured training, predicted weights against real models, and impossible runs refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from google.protobuf import json_format

from stillhouse.client.cli import cli
from stillhouse.client.estimate import memory
from stillhouse.client.estimate.memory import MemoryPlan, student_bytes
from stillhouse.client.estimate.model_shape import ModelShape
from stillhouse.client.runfile import load
from stillhouse.protos.errors import StillhouseError
from stillhouse.student_trainer.config import proto, schema
from stillhouse.student_trainer.config.fields import Choices, fields_of
from stillhouse.student_trainer.config.schema import OptimizerConfig
from stillhouse.student_trainer.config.settled.micro_batch import AUTO_TOKENS
from tests.conftest import Models
from tests.student_trainer.config.specs import SMALLEST, spec_of
from tests.student_trainer.train.runs import make_run, start

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
QWEN_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
MIXTRAL = LLAMA_8B | {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}


def shape_of(directory: Path, values: dict[str, Any]) -> ModelShape:
    (directory / "config.json").write_text(json.dumps(values))
    return ModelShape.read(directory)


@pytest.mark.parametrize(
    ("values", "published"),
    [(LLAMA_8B, 8.03e9), (QWEN_05B, 494e6), (GPT2, 124e6), (MIXTRAL, 46.7e9)],
    ids=["llama-8b", "qwen-0.5b", "gpt2", "mixtral"],
)
def test_weights_are_counted_to_a_hundredth(tmp_path: Path, values: dict[str, Any], published: float) -> None:
    assert shape_of(tmp_path, values).parameters == pytest.approx(published, rel=0.01)


def test_an_adapter_is_counted_as_peft_makes_it(models: Models) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models.teacher)
    shape = ModelShape.read(models.teacher)
    assert shape.parameters == pytest.approx(model.num_parameters(), rel=0.01)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape.lora(4) == adapted.get_nb_trainable_parameters()[0]


def test_the_defaults_are_those_of_the_trainer() -> None:
    spec = spec_of({**SMALLEST, "student": {"model": "m", "lora": {}}})
    run, plan = proto.from_proto(spec), MemoryPlan.from_spec(spec, "cpu")
    assert run.student.lora is not None
    assert plan == MemoryPlan(
        device="cpu",
        pass_tokens=AUTO_TOKENS["cpu"],
        rows_per_pass=None,
        sequence_tokens=run.data.max_sequence_tokens,
        lora_rank=run.student.lora.rank,
        quantization=run.student.quantization,
        checkpointing=run.student.gradient_checkpointing,
        optimizer=run.optimizer.name,
        half=False,
    )


def test_a_pass_is_counted_by_tokens_or_by_rows() -> None:
    def pass_tokens(**optimizer: int) -> int:
        spec = spec_of({**SMALLEST, "data": {**SMALLEST["data"], "max_sequence_tokens": 100}})
        for name, value in optimizer.items():
            setattr(spec.optimizer, name, value)
        return MemoryPlan.from_spec(spec, "cpu").pass_tokens

    assert memory.AUTO_TOKENS == AUTO_TOKENS
    assert memory.ROWS == schema.BATCH_SIZE == schema.MICRO_BATCH_SIZE
    assert pass_tokens() == pass_tokens(grad_accum_steps=3) == 800
    assert pass_tokens(batch_size=64) == 4000
    assert pass_tokens(batch_size=64, micro_batch_tokens=250) == 200
    assert pass_tokens(batch_size=64, micro_batch_tokens=7) == 100
    assert pass_tokens(micro_batch_size=3) == 300


def test_every_optimizer_of_a_run_can_be_estimated() -> None:
    assert set(memory.OPTIMIZER_BYTES) == set(fields_of(OptimizerConfig)["name"].rule(Choices) or ())


@pytest.mark.model
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_real_run_uses_the_predicted_memory(tmp_path: Path, models: Models, *, checkpointing: bool) -> None:
    from tests.support.small_models import make_model

    student = make_model(
        tmp_path / "student", tokenizer_dir=models.teacher, hidden_size=512, num_layers=6, num_heads=8, seed=1
    )
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text * 8}) + "\n" for text in models.texts[:16]))
    spec = {
        "student": {"model": str(student), "gradient_checkpointing": checkpointing},
        "data": {"train": [{"path": str(data)}], "eval_fraction": 0, "max_sequence_tokens": 256},
        "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
        "optimizer": {"micro_batch_size": 8, "max_steps": 2},
    }
    process = start(make_run(tmp_path, "run", spec))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (tmp_path / "runs/run/attempts/1/log").read_text()
    parts = student_bytes(ModelShape.read(student), MemoryPlan.from_spec(spec_of(spec), "cpu"))
    assert checkpointing or parts["activations"] > sum(parts.values()) / 4
    assert usage.ru_maxrss * 1024 == pytest.approx(sum(parts.values()), rel=0.25), parts


def estimate(directory: Path, spec: dict[str, Any], *flags: str) -> Result:
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump(spec))
    return CliRunner().invoke(cli, ["estimate", str(file), *flags])


def test_an_impossible_run_is_refused_with_remedies(tmp_path: Path) -> None:
    shape_of(tmp_path, LLAMA_8B)
    spec = {"student": {"model": str(tmp_path)}, "optimizer": {"micro_batch_size": 1}}
    result = estimate(tmp_path, spec, "--device", "gpu", "--memory-gib", "80")
    assert result.exit_code == 1
    assert "It cannot fit" in result.stdout
    assert "student.lora: {} would take" in result.stdout
    assert ", which fits" in result.stdout
    flags = ("--device", "gpu", "--memory-gib", "80", "--json")
    document = json.loads(estimate(tmp_path, spec, *flags).stdout)
    # 16 bytes a weight for weights, gradients and two moments, and 2 for what autocast computes with.
    assert document["student"]["total_bytes"] > 18 * document["parameters"]
    adapted = spec | {"student": {"model": str(tmp_path), "lora": {}}}
    fits = estimate(tmp_path, adapted, *flags, "--set", "student.gradient_checkpointing=true")
    assert (fits.exit_code, json.loads(fits.stdout)["student"]["fits"]) == (0, True)


def test_without_student_and_trainer_the_flag_to_give_is_named(tmp_path: Path) -> None:
    result = estimate(tmp_path, {"student": {"model": "Qwen/Qwen2.5-0.5B"}})
    assert result.exit_code == 2
    assert (
        "Qwen/Qwen2.5-0.5B is not on this machine, and the trainer does not tell its sizes" in result.stderr
    )
    assert "as --student-model" in result.stderr


def test_the_teacher_is_estimated_too(tmp_path: Path) -> None:
    shape_of(tmp_path, QWEN_05B)
    big = tmp_path / "big"
    big.mkdir()
    shape_of(big, LLAMA_8B)
    spec = {"student": {"model": str(tmp_path)}, "optimizer": {"micro_batch_size": 1}}
    flags = [
        "--device",
        "gpu",
        "--memory-gib",
        "24",
        "--teacher-model",
        str(big),
        "--json",
        "--teacher-apart",
    ]
    whole = json.loads(estimate(tmp_path, spec, *flags).stdout)["teacher"]
    assert whole["parts_bytes"]["weights"] == pytest.approx(16.06e9, rel=0.01)
    assert whole["fits"]
    assert not json.loads(estimate(tmp_path, spec, *flags, "--teacher-dtype", "float32").stdout)["teacher"][
        "fits"
    ]


def test_what_shares_a_device_is_summed(tmp_path: Path) -> None:
    shape_of(tmp_path, QWEN_05B)
    spec = {"student": {"model": str(tmp_path)}, "optimizer": {"micro_batch_size": 1}}
    flags = ["--memory-gib", "15", "--teacher-model", str(tmp_path), "--teacher-dtype", "float32", "--json"]

    def told(spec: dict[str, Any], *more: str) -> tuple[int, dict[str, Any]]:
        result = estimate(tmp_path, spec, *flags, *more)
        return result.exit_code, json.loads(result.stdout)

    code, both = told(spec, "--device", "gpu")
    each = [both[name]["total_bytes"] for name in ("student", "teacher")]
    assert both["student"]["fits"]
    assert both["teacher"]["fits"]
    assert (code, both["fits"], both["together"]["total_bytes"]) == (1, False, sum(each))
    larger = ("--device", "gpu", "--memory-gib", "24", "--teacher-model", str(tmp_path))
    fitting = estimate(tmp_path, spec, *larger).stdout
    assert re.search(r"start the teacher with --gpu-memory-utilization 0\.[34]\d? at most", fitting), fitting
    away = spec | {"teachers": [{"targets": ["gpu-host:7401"]}]}
    here = spec | {"teachers": [{"targets": ["127.0.0.1:7401"]}]}
    assert told(away, "--device", "gpu")[0] == told(here, "--device", "gpu", "--teacher-apart")[0] == 0
    assert told(here, "--device", "cpu")[0] == 1
    two = away | {"resources": {"num_processes": 2, "gpu_count": 0}}
    code, document = told(two, "--device", "cpu")
    assert (code, document["together"]["total_bytes"]) == (1, 2 * document["student"]["total_bytes"])
    text = estimate(tmp_path, two, "--device", "cpu", "--memory-gib", "14").stdout
    assert "2 training processes on one device: " in text
    assert "They cannot fit: " in text


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_hidden_states_are_counted(tmp_path: Path, device: str) -> None:
    shape_of(tmp_path, QWEN_05B)
    big = tmp_path / "big"
    big.mkdir()
    shape_of(big, LLAMA_8B)
    spec: dict[str, Any] = {
        "student": {"model": str(tmp_path), "keep_layers": [0, 11, 23]},
        "teachers": [{"targets": ["gpu-host:7401"], "prefetch_steps": 3}],
        "data": {"max_sequence_tokens": 100},
        "optimizer": {"batch_size": 8, "micro_batch_tokens": 400, "precision": "fp32"},
    }
    flags = (
        "--device",
        device,
        "--memory-gib",
        "1",
        "--teacher-model",
        str(big),
        "--teacher-apart",
        "--json",
    )

    def document(**hidden: Any) -> dict[str, Any]:
        loss = {"loss": {"hidden_mse": hidden}} if hidden else {}
        return dict(json.loads(estimate(tmp_path, spec | loss, *flags).stdout))

    def told(**hidden: Any) -> dict[str, int]:
        return dict(document(**hidden)["student"]["parts_bytes"])

    without, compared = told(), told(weight=1)
    assert "hidden states" not in without
    assert "hidden states" not in told(weight=0)
    pairs, projection = 3, 3 * 896 * 4096
    assert compared["gradients"] - without["gradients"] == 4 * projection
    assert compared["optimizer"] - without["optimizer"] == 8 * projection
    waiting = 4 * 8 * 100 * pairs * 4096 * 4 if device == "cpu" else 0
    # A pass holds the teacher's states, and of each pair the student's, the projected one and the difference.
    held = 400 * 4 * pairs * (4096 + 896 + 2 * 4096)
    assert compared["hidden states"] == waiting + held
    remedies = {each["set"] for each in document(weight=1)["remedies"]}
    assert "one pair in loss.hidden_mse.layers" in remedies
    one = told(layers=[{"teacher": 32, "student": 3}])
    assert one["hidden states"] == compared["hidden states"] / 3
    assert (
        told(layers=[{"teacher": 32, "student": 3}], normalise=True)["hidden states"] > one["hidden states"]
    )


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"hidden_size": -1}', '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 0, "vocab_size": 3}'])  # fmt: skip
def test_a_file_that_is_not_a_model_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(StillhouseError, match="does not tell the model's sizes"):
        ModelShape.read(tmp_path)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("optimizer.batch_size=0", "optimizer.batch_size: 0 is out of range; it must be in [1, 65536]."),
        (
            "optimizer.micro_batch_tokens=-5",
            "optimizer.micro_batch_tokens: -5 is out of range; it must be at least 1.",
        ),
        (
            "optimizer.micro_batch_size=0",
            "optimizer.micro_batch_size: 0 is out of range; it must be at least 1.",
        ),
        ("data.max_sequence_tokens=0", "data.max_sequence_tokens: 0 is out of range; it must be at least 2."),
        ("student.lora.rank=0", "student.lora.rank: 0 is out of range; it must be in [1, 1024]."),
        (
            "student.quantization=int4",
            'student.quantization: "int4" is not known. Possible: none, int8, nf4.',
        ),
        ("optimizer.precision=half", 'optimizer.precision: "half" is not known. Possible: bf16, fp16, fp32.'),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: 0.0 is out of range; it must be above 0."),
        ("data.eval_fraction=1", "data.eval_fraction: 1.0 is out of range; it must be in [0, 1)."),
        ("loss.terms[0].weight=-1", "loss.terms[0].weight: -1.0 is out of range; it must be at least 0."),
        ("resources.num_processes=-2", "resources.num_processes: -2 is out of range; it must be in [0, "),
    ],
)
def test_a_value_out_of_range_is_refused_as_the_service_does(
    tmp_path: Path, given: str, sentence: str
) -> None:
    shape_of(tmp_path, QWEN_05B)
    result = estimate(tmp_path, {"student": {"model": str(tmp_path)}}, "--set", given)
    assert result.exit_code == 2, result.output
    assert f"--set {given}: {sentence}" in result.stderr
    spec = spec_of({**SMALLEST, "student": {"model": "m"}})
    apply = load.parse_fields(json_format.MessageToDict(spec, preserving_proto_field_name=True), [given]).spec
    with pytest.raises(StillhouseError) as refused:
        proto.from_proto(apply)
    path, _, problem = sentence.partition(": ")
    told = {each.field: each.description for each in refused.value.violations}[path]
    assert problem.partition(" Possible")[0].rstrip(".") in told
