"""Files sent to a hub: the files that were pulled, without a path of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub

from stillhouse.client.trainer.hub import _additions
from stillhouse.protos.files.adapter import CONFIG, name_base


def test_an_adapters_base_is_named_by_its_folder_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    files = [tmp_path / CONFIG, tmp_path / "base" / "config.json"]
    for file in files:
        file.write_text("{}")
    (tmp_path / "secret.txt").write_text("mine")
    name_base(tmp_path, tmp_path)
    sent = {
        each.path_in_repo: each.path_or_fileobj for each in _additions(huggingface_hub, files, tmp_path, None)
    }
    assert sent.keys() == {CONFIG, "base/config.json"}
    assert json.loads(sent[CONFIG]) == {"base_model_name_or_path": "base"}
    assert str(tmp_path) in files[0].read_text()
