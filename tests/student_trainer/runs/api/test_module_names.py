"""Names of modules, checked against a model's files without loading it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from stillhouse.student_trainer.runs.api.module_names import unknown_modules
from tests.conftest import Models


def in_several_files(directory: Path, names: dict[str, str]) -> None:
    """Writes an index, and its files with empty tensors."""
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for file in set(names.values()):
        held = {name: np.zeros(1) for name, each in names.items() if each == file}
        save_file(held, directory / file)


def test_a_name_that_no_file_of_the_model_has_is_unknown(models: Models, tmp_path: Path) -> None:
    known = ["q_proj", "self_attn.v_proj", "lm_head", "model.layers.0.mlp.up_proj"]
    assert unknown_modules(models.student, known) is None
    problem = unknown_modules(models.student, [*known, "query", "proj"])
    assert problem is not None
    assert problem.startswith("query, proj: no module of this model matches. Its modules are ")
    # The index of a model in several files; a model without weights, as for from_config; experts under other names.
    names = {"model.layers.0.up.weight": "model-00001-of-00001.safetensors"}
    in_several_files(tmp_path, names)
    assert unknown_modules(tmp_path, ["up"]) is None
    assert unknown_modules(tmp_path, ["q_proj"]) is not None
    in_several_files(
        tmp_path, {**names, "model.layers.0.experts.0.up.weight": "model-00001-of-00001.safetensors"}
    )
    assert unknown_modules(tmp_path, ["q_proj"]) is None
    assert unknown_modules(tmp_path / "none", ["q_proj"]) is None
