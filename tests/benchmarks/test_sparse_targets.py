"""The benchmark of sparse targets at tiny sizes: shares, gradients, and targets that students share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.distillation.sparse_forms import FULL, Form, settled
from benchmarks.distillation.sparse_targets import _SharedTargets, main
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig


def test_tables_of_shares_and_gradients_are_printed_and_kept(tmp_path: Path) -> None:
    text, found = tmp_path / "text", tmp_path / "found.json"
    text.write_text(
        "".join(f"The number {n} is {n * n} squared, and {n % 7} is left of {n}.\n" for n in range(2000))
    )
    sizes = {
        "vocabulary": 300,
        "teacher-steps": 3,
        "steps": 21,
        "warm-steps": 3,
        "student-batch": 2,
        "held-out-rows": 2,
    }
    options = [
        *("--text", str(text), "--work-dir", str(tmp_path), "--json", str(found), "--seeds", "2"),
        *("--teacher-width", "16", "--student-width", "8", "--form", "stratified_tail:16:0"),
        *("--divergence", "jsd", "--divergence", "forward_kl"),
        *(part for name, size in sizes.items() for part in (f"--{name}", str(size))),
    ]
    for _ in range(2):  # the second time from the students that were kept
        ran = CliRunner().invoke(main, options, catch_exceptions=False)
        assert ran.exit_code == 0, ran.output
    content = json.loads(found.read_text())
    for name in ("jsd at temperature 1", "forward_kl at temperature 1"):
        kept = content["losses"][name]
        assert kept["full"]["share"][0] == 1
        (draws,) = (each for form, each in kept.items() if form.startswith("stratified_tail"))
        assert draws["bytes"] > 0
        assert len(draws["seeds"]) == 2
    assert "truncated k=64, clamped" in content["gradients"]["cosines"]
    assert 0 <= content["gradients"]["clamped"]["positions"] <= 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_students_share_targets_that_are_those_of_each_alone(temperature: float) -> None:
    logprobs = torch.randn(6, 400, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    losses = [
        LossConfig(terms=(LossTermConfig(divergence=name),), temperature=temperature)
        for name in ("jsd", "tvd", "forward_kl")
    ]
    form = settled(Form(kind="stratified_tail", top_k=16), losses[0], 400)
    together = _SharedTargets(1)
    for _ in range(2):
        shared = [together.of(logprobs, form, loss) for loss in losses]
        together.forget()
    assert shared[0] is shared[1]
    # Forward KL's draws have log-probabilities from temperature 2 on alone.
    assert (shared[0] is shared[2]) == (temperature == 2)
    for target, loss in zip(shared, losses, strict=True):
        alone = _SharedTargets(1)
        alone.of(logprobs, form, loss)
        alone.forget()
        own = alone.of(logprobs, form, loss)
        assert torch.equal(target.token_ids, own.token_ids)  # type: ignore[union-attr]
        assert torch.equal(target.logprobs, own.logprobs)
        assert alone.num_bytes(form, loss) == together.num_bytes(form, loss)
    assert together.num_bytes(FULL, losses[0]) == []
