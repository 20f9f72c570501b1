"""A run whose teacher has another tokenizer: through a real service, against the same computation in one process."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from tests.conftest import Models
from tests.student_trainer.train.runs import (
    failure,
    final_weights,
    finish_here,
    metric,
    spec_of,
)
from tests.support.programs import Program

ALM = {"foreign_tokenizer": "alm"}


def _spec(models: Models, data: Path, teacher: Program, /, **further: Any) -> dict[str, Any]:
    """Run spec of a student whose tokenizer the teacher does not share."""
    return spec_of(models.foreign, data, teacher.target, **{"loss": ALM, **further})


def test_a_foreign_teacher_is_refused_with_the_remedy(
    run: Callable[..., RunDir], models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    run_dir = run(_spec(models, dataset_file, hf_teacher, loss={"top_k": 8}), code=EXIT_FAILED)
    assert "foreign" in failure(run_dir)
    assert "loss.foreign_tokenizer: alm" in failure(run_dir)


@pytest.mark.parametrize("packing", [False, True])
def test_a_student_learns_from_a_foreign_teacher(
    run: Callable[..., RunDir], models: Models, dataset_file: Path, hf_teacher: Program, packing: bool
) -> None:
    spec = _spec(
        models,
        dataset_file,
        hf_teacher,
        optimizer={"max_steps": 12, "learning_rate": 1e-2, "batch_size": 8},
        data={"packing": packing},
    )
    run_dir = run(spec)
    losses, held_out = metric(run_dir, "train/loss"), metric(run_dir, "eval/alm")
    assert held_out[12] < 0.7 * held_out[0]
    assert losses == metric(run_dir, "train/alm_forward_kl")
    assert metric(run_dir, "train/aligned")[1] == pytest.approx(1.0)
    assert set(metric(run_dir, "eval/perplexity")) == {0, 12}
    assert not metric(run_dir, "eval/kl")


def test_the_served_loss_is_that_of_both_models_in_one_process(
    run: Callable[..., RunDir], models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    """Aligned by brute force over byte offsets, without the trainer's code."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in dataset_file.read_text().splitlines()[:3]]
    data = tmp_path / "three.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    optimizer = {"max_steps": 1, "micro_batch_size": 3, "grad_accum_steps": 1}
    run_dir = run(_spec(models, data, hf_teacher, data={"eval_fraction": 0}, optimizer=optimizer))

    def read(directory: Path, row: dict[str, str]) -> tuple[list[int], list[int], list[float]]:
        """Returns the end offset of each token in bytes (one more for the end token) and log-probabilities from the second on."""
        tokenizer, model = (
            AutoTokenizer.from_pretrained(directory),
            AutoModelForCausalLM.from_pretrained(directory).double(),
        )
        parts = [tokenizer(row[name])["input_ids"] for name in ("prompt", "completion")]
        ids = [*parts[0], *parts[1], tokenizer.eos_token_id]
        ends = [len(tokenizer.decode(ids[:count]).encode()) for count in range(1, len(ids))]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [logprobs[place - 1, ids[place]].item() for place in range(1, len(ids))]
        return [*ends, ends[-1] + 1], parts[0], own

    total = number = 0.0
    for row in rows:
        (ours, prompt, student), (theirs, _, teacher) = (
            read(each, row) for each in (models.foreign, models.teacher)
        )
        begin = ours[len(prompt) - 1]
        boundaries = sorted(each for each in set(ours) & set(theirs) if each >= begin)
        for after, until in itertools.pairwise(boundaries):
            pair = [
                sum(value for end, value in zip(ends[1:], values, strict=True) if after < end <= until)
                for ends, values in ((theirs, teacher), (ours, student))
            ]
            p, q = (torch.tensor(each / 100 - 1e-6, dtype=torch.float64).exp() for each in pair)
            total += (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).item()
            number += 1
    assert number > 10
    assert metric(run_dir, "train/loss")[1] == pytest.approx(total / number, rel=1e-4)


def test_a_student_that_is_its_teacher_has_loss_zero(
    run: Callable[..., RunDir], models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    """With one tokenizer on both sides a chunk is a token."""
    spec = spec_of(
        models.teacher, dataset_file, hf_teacher.target, loss=ALM, optimizer={"learning_rate": 1e-12}
    )
    run_dir = run(spec)
    assert max(map(abs, metric(run_dir, "train/loss").values())) < 1e-9
    assert max(metric(run_dir, "train/chunk_gap").values()) < 1e-4


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_micro_batches_change_nothing(
    run: Callable[..., RunDir], models: Models, dataset_file: Path, hf_teacher: Program, reduction: str
) -> None:
    loss = {
        **ALM,
        "hard_weight": 0.1,
        "reduction": reduction,
        "terms": [{"divergence": "reverse_kl", "weight": 100}],
    }
    curves = []
    for size in (8, 2):
        sizes = {"micro_batch_size": size, "grad_accum_steps": 8 // size}
        optimizer = {"max_steps": 2, "name": "sgd", "learning_rate": 0.1, **sizes}
        curves.append(
            metric(run(_spec(models, dataset_file, hf_teacher, loss=loss, optimizer=optimizer)), "train/loss")
        )
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_a_resumed_run_continues_exactly(
    run: Callable[..., RunDir], models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    import numpy as np

    spec = _spec(models, dataset_file, hf_teacher, optimizer={"max_steps": 6}, checkpoint={"every_steps": 3})
    whole = final_weights(run(spec))
    checkpoints = tmp_path / "runs" / "run-2" / "checkpoints"

    def stopped() -> bool:
        return any(checkpoints.glob("*/MANIFEST.json"))

    halves = run(spec, stopped=stopped)
    assert max(metric(halves, "train/loss")) < 6
    assert finish_here(halves, attempt=2) == 0
    for name, array in final_weights(halves).items():
        np.testing.assert_array_equal(array, whole[name])


def test_the_second_epoch_is_read_from_a_cache(
    run: Callable[..., RunDir], models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    spec = _spec(models, dataset_file, hf_teacher, optimizer={"epochs": 2})
    plain = run(spec)
    cached = run({**spec, "cache": {"path": "caches/foreign"}})
    assert metric(cached, "train/loss") == pytest.approx(metric(plain, "train/loss"), abs=1e-7)
    asked = [max(metric(each, "teacher/sequences_asked").values()) for each in (plain, cached)]
    assert asked[1] <= asked[0] / 2
    again = run({**spec, "cache": {"path": "caches/foreign", "mode": "read"}})
    assert max(metric(again, "teacher/sequences_asked").values()) == 0
