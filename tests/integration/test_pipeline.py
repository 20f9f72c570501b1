"""A pipeline's run: made once, its model downloaded again where it is lost, another run after a change of its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Models
from tests.support.runs import Service


@pytest.mark.slow
def test_a_run_is_trained_again_for_other_rows_and_not_for_a_lost_model(
    service: Service, models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    rows, path = tmp_path / "rows.jsonl", tmp_path / "p.yaml"
    rows.write_bytes(dataset_file.read_bytes())
    path.write_text(
        f"""
stages:
  - name: student
    outputs: {{model: student}}
    distil:
      student: {{model: "{models.student}"}}
      data: {{train: [{{path: rows.jsonl}}], max_sequence_tokens: 64}}
      loss: {{terms: [{{weight: 0}}], hard_weight: 1}}
      optimizer: {{max_steps: 1, micro_batch_size: 2, learning_rate: 1.0e-3}}
"""
    )

    def run() -> str:
        service.stillhouse("pipeline", "run", str(path))
        shown = json.loads(service.stillhouse("pipeline", "show", str(path), "--json").stdout)
        return str(shown["stages"][0]["run"])

    first = run()
    config = tmp_path / "p.work" / "student" / "config.json"
    content = config.read_bytes()
    config.unlink()
    assert run() == first
    assert config.read_bytes() == content

    rows.write_bytes(dataset_file.read_bytes() * 2)
    assert run() != first
