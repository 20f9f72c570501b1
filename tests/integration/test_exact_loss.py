"""Served and trained losses equal the mathematics: student = teacher has loss 0, and noise has the dense loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.client.api import RunHandle, Trainer
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher
from tests.support.runs import Service, completed, curve, small_spec
from tests.support.small_models import make_model, make_tokenizer
from tests.support.texts import sentences

NUM_ROWS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Exact:
    """A teacher of so few tokens that its top-k is its whole vocabulary."""

    model: Path
    vocab_size: int
    rows: Path
    program: Program


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exact]:
    root = tmp_path_factory.mktemp("exact")
    texts = list(sentences(200, seed=11))
    tokenizer = make_tokenizer(texts, root / "tokenizer", 160, full_alphabet=False)
    model = make_model(
        root / "model",
        tokenizer_dir=tokenizer,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        seed=11,
        initializer_range=0.3,
    )
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:NUM_ROWS]))
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    with (
        no_process_left() as mark,
        start_teacher(
            model,
            engine="hf",
            directory=root,
            options=["--dtype", "float32", "--threads", "1"],
            environment=mark,
        ) as program,
    ):
        yield Exact(model=model, vocab_size=vocab_size, rows=rows, program=program)


def run_once(exact: Exact, student: Path, service: Service, trainer: Trainer) -> RunHandle:
    """A completed run of one step on all rows at once, with every token of the vocabulary on a float32 wire."""
    spec = small_spec(student=student, train=exact.rows, teacher=exact.program.target, steps=1)
    spec["teachers"][0]["logprob_dtype"] = "float32"
    spec["data"]["eval_fraction"] = 0
    spec["loss"]["top_k"] = spec["evaluation"]["top_k"] = exact.vocab_size
    spec["optimizer"]["micro_batch_size"] = NUM_ROWS
    handle = trainer.create_run(spec)
    completed(handle, service)
    return handle


def test_a_student_equal_to_its_teacher_has_loss_zero(
    exact: Exact, service: Service, trainer: Trainer
) -> None:
    assert exact.vocab_size <= 256
    losses = curve(run_once(exact, exact.model, service, trainer))
    assert losses.keys() == {1}
    assert abs(losses[1]) < 1e-6


def test_after_noise_on_one_weight_the_loss_is_the_dense_one(
    exact: Exact, service: Service, trainer: Trainer, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(exact.model)
    student = AutoModelForCausalLM.from_pretrained(exact.model)
    tokenizer = AutoTokenizer.from_pretrained(exact.model)
    weight = student.model.layers[0].mlp.down_proj.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight += 0.01 * weight.std() * noise
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    texts = [json.loads(line)["text"] for line in exact.rows.read_text().splitlines()]
    dense = dense_forward_kl(teacher, student, [tokenizer(text)["input_ids"] for text in texts])
    served = curve(run_once(exact, tmp_path, service, trainer))[1]
    assert dense > 1e-6
    assert served == pytest.approx(dense, abs=1e-5)
    assert served == pytest.approx(dense, rel=0.01)


@torch.no_grad()
def dense_forward_kl(teacher: torch.nn.Module, student: torch.nn.Module, rows: list[list[int]]) -> float:
    """Mean over all predicted tokens of KL(teacher || student) over the whole vocabulary, in float64."""
    teacher.double()
    student.double()
    divergences = []
    for row in rows:
        ids = torch.tensor([row])
        teacher_logprobs = teacher(ids).logits[0, :-1].log_softmax(-1).numpy()
        student_logprobs = student(ids).logits[0, :-1].log_softmax(-1).numpy()
        divergences.append((np.exp(teacher_logprobs) * (teacher_logprobs - student_logprobs)).sum(-1))
    return float(np.concatenate(divergences).mean())
