"""One optimizer step: fusing, chunks, packing and micro-batches save memory or time and change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import json_format
from transformers import AutoModelForCausalLM

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.train import step
from stillhouse.student_trainer.train.batching.collate import Factor, MicroBatch, ScoredExample
from stillhouse.student_trainer.train.batching.passes import CPU_PASS_TOKENS
from stillhouse.student_trainer.train.checkpointing.checkpoint import Progress
from stillhouse.student_trainer.train.contexts.source import StepData
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.loss import fused
from stillhouse.student_trainer.train.student import lm_head
from stillhouse.student_trainer.train.student.packing_check import cutter_of
from stillhouse.student_trainer.train.student.student import Student, load_tokenizer
from tests.conftest import Models
from tests.student_trainer.train.students import CPU, load_student, make_stepper

TOP_K = 8


def _scored(vocab_size: int) -> list[ScoredExample]:
    """Four ragged sequences with the answers of a teacher of random logits."""
    random = np.random.default_rng(0)
    scored = []
    for length in (5, 9, 17, 30):
        logits = torch.from_numpy(random.normal(size=(length - 1, vocab_size)) * 3)
        top = logits.log_softmax(-1).topk(TOP_K, -1)
        token_ids = random.integers(4, vocab_size, length, dtype=np.int32)
        answer = Distributions(
            start=1,
            token_ids=top.indices.int().numpy(),
            logprobs=top.values.float().numpy(),
            target_logprobs=np.zeros(length - 1, np.float32),
            log_tail=torch.log1p(-top.values.exp().sum(-1)).float().numpy(),
        )
        mask = np.arange(length) > 0
        scored.append(
            ScoredExample(
                example=Example(token_ids=token_ids, mask=mask, place=f"row {length}"), answer=answer
            )
        )
    return scored


def _take(config: RunConfig, data_dir: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    student = load_student(config.student, data_dir)
    data = StepData(step=0, scored=_scored(len(student.tokenizer)), teacher_wait_s=0.0)
    metrics = make_stepper(config, student, total_steps=1).take_step(data, Progress())
    return metrics, {name: weight.detach().clone() for name, weight in student.trainable_parameters().items()}


def _config(models: Models, **further: object) -> RunConfig:
    spec = {
        "student": {"model": str(models.student)},
        "teachers": [{"targets": ["127.0.0.1:1"]}],
        "data": {"train": [{"path": "unused.jsonl"}]},
        "loss": {"top_k": TOP_K, "sparse_target": "tail_bucket", "hard_weight": 0.5},
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "warmup_fraction": 0, "lr_scheduler": "constant"},
    }
    for path, value in further.items():
        section, _, name = path.partition("__")
        spec[section] = {**spec[section], name: value}  # type: ignore[dict-item]
    return from_proto(json_format.ParseDict(spec, RunSpec()))


def _same(found: tuple[dict[str, float], dict[str, torch.Tensor]], config: RunConfig, data_dir: Path) -> None:
    """The metrics and weights are those of a step of `config` with whole logits."""
    whole_metrics, whole = _take(config, data_dir)
    metrics, weights = found
    names = ("loss", "forward_kl", "cross_entropy", "teacher_mass", "grad_norm")
    for name in (f"train/{each}" for each in names):
        assert metrics[name] == pytest.approx(whole_metrics[name], rel=1e-5), name
    for name, weight in whole.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No output layer is plain."""
    monkeypatch.setattr(lm_head, "_plain_layer", lambda model: None)


def test_fusing_changes_nothing(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CPU_CHUNK_LOGITS", 7 * 400)
    found = _take(_config(models), tmp_path)
    monkeypatch.setattr(lm_head, "_plain_layer", lambda model: None)
    _same(found, _config(models), tmp_path)


@pytest.mark.usefixtures("unfused")
def test_chunks_of_whole_logits_change_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(step, "CHUNK_LOGITS", 7 * 400)
        found = _take(_config(models), tmp_path)
    _same(found, _config(models), tmp_path)


@pytest.mark.faults(row=18)
def test_a_step_with_a_non_finite_loss_is_counted_and_leaves_no_trace(models: Models, tmp_path: Path) -> None:
    untied = AutoModelForCausalLM.from_pretrained(models.student)
    head = untied.get_input_embeddings().weight.detach().clone()
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(head)
    untied.save_pretrained(tmp_path / "untied")
    load_tokenizer(_config(models).student, tmp_path).save_pretrained(tmp_path / "untied")
    config = _config(models, student__model=str(tmp_path / "untied"), optimizer__micro_batch_size=1)
    lost_id = len(load_tokenizer(config.student, tmp_path)) - 1

    def train(*steps: list[ScoredExample]) -> tuple[dict[str, torch.Tensor], Progress]:
        student, progress = load_student(config.student, tmp_path), Progress()
        with torch.no_grad():
            dict(student.model.named_parameters())["model.embed_tokens.weight"][lost_id] = torch.nan
        stepper = make_stepper(config, student, total_steps=len(steps))
        for number, scored in enumerate(steps):
            stepper.take_step(StepData(step=number, scored=scored, teacher_wait_s=0.0), progress)
        return {**student.trainable_parameters()}, progress

    good = _scored(lost_id)
    last = good[-1].example  # behind passes whose gradients are there already
    token_ids = np.concatenate([[lost_id], last.token_ids[1:]]).astype(np.int32)
    bad = [*good[:-1], replace(good[-1], example=replace(last, token_ids=token_ids))]

    weights, progress = train(good, bad, good)
    expected, undisturbed = train(good, good)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0, equal_nan=True, msg=name)
    assert (progress.step, progress.skipped_steps, progress.skipped_in_a_row) == (3, 1, 0)
    assert progress.trained_tokens == undisturbed.trained_tokens
    assert train(good, bad, bad)[1].skipped_in_a_row == 2


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_packing_and_micro_batches_change_nothing(
    models: Models, tmp_path: Path, micro_batch_size: int
) -> None:
    found = _take(_config(models, data__packing=True, optimizer__micro_batch_size=micro_batch_size), tmp_path)
    _same(found, _config(models), tmp_path)


def test_a_small_body_under_a_trained_vocabulary_takes_few_passes(models: Models, tmp_path: Path) -> None:
    config = _config(models)
    student = load_student(config.student, tmp_path)
    trained = cutter_of(config, student, CPU)
    student.plain.get_input_embeddings().weight.requires_grad_(requires_grad=False)
    student.plain.get_output_embeddings().weight.requires_grad_(requires_grad=False)
    frozen = cutter_of(config, student, CPU)
    assert trained.pass_tokens > frozen.pass_tokens > CPU_PASS_TOKENS
    lengths = [60, 50, 40, 30, 20, 10]
    assert len(trained.cut(lengths)) < len(replace(trained, pass_tokens=CPU_PASS_TOKENS).cut(lengths))


def test_token_weightings_have_mean_one_over_the_step(models: Models, tmp_path: Path) -> None:
    terms = [{"divergence": "tvd", "token_weighting": "teacher_entropy"}]
    config = _config(models, loss__terms=terms, optimizer__micro_batch_size=2)
    tokenizer = load_tokenizer(config.student, tmp_path)
    scored = _scored(len(tokenizer))
    plain = Factor(weighting="teacher_entropy", vocab_size=len(tokenizer))
    factor = plain.scaled(*plain.sums(scored, "token_mean"))
    values = np.concatenate([factor.compute(each, np.flatnonzero(each.example.mask)) for each in scored])
    assert values.mean() == pytest.approx(1)
    assert values.std() > 0.01
    once, twice = _take(config, tmp_path), _take(_config(models, loss__terms=terms), tmp_path)
    assert once[0]["train/loss"] == pytest.approx(twice[0]["train/loss"], rel=1e-5)


def test_only_a_layer_whose_matmul_is_the_logits_is_fused(models: Models, tmp_path: Path) -> None:
    student = load_student(_config(models).student, tmp_path)
    assert lm_head.LmHead(student).layer is not None
    student.model.get_output_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda module, inputs, output: output.tanh()
    )
    assert lm_head.LmHead(student).layer is None


def test_a_model_that_mixes_packed_sequences_is_refused(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_positions(self: Student, batch: MicroBatch) -> torch.Tensor:
        return logits(self, replace(batch, position_ids=None))

    logits = Student.logits
    monkeypatch.setattr(Student, "logits", without_positions)
    with pytest.raises(StillhouseError, match=r"data\.packing: .* mixes sequences"):
        _take(_config(models, data__packing=True), tmp_path)


def test_a_model_is_packed_unasked_where_a_trial_keeps_rows_apart(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(models)
    student = load_student(config.student, tmp_path)
    logits = Student.logits

    def without_positions(self: Student, batch: MicroBatch) -> torch.Tensor:
        return logits(self, replace(batch, position_ids=None))

    def failing(self: Student, batch: MicroBatch) -> torch.Tensor:
        raise TypeError("unexpected keyword argument 'position_ids'")

    def packing() -> str:
        return cutter_of(config, student, CPU).packing

    assert packing() == "cheaper"
    for forward in (without_positions, failing):
        monkeypatch.setattr(Student, "logits", forward)
        assert packing() == "never"
    monkeypatch.undo()
    assert cutter_of(_config(models, data__packing=False), student, CPU).packing == "never"
    by_rows = cutter_of(_config(models, optimizer__micro_batch_size=2), student, CPU)
    assert (by_rows.packing, by_rows.max_tokens, by_rows.max_rows) == ("never", None, 2)
    student.plain.config._attn_implementation = "eager"
    assert packing() == "never"
