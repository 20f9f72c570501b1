"""Kept scans of an installation equal those of transformers, and are made again after a change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.child_process import python_path

PROGRAM = """
import importlib.metadata, json, os, sys
opened = []
def see(event, arguments):
    name = str(arguments[0]) if event == "open" else ""
    if name.endswith((".py", "top_level.txt", "RECORD")) and "__pycache__" not in name:
        opened.append(name)
if "plain" not in sys.argv:
    from stillhouse.protos.import_scans import keep_scans
    keep_scans()
sys.addaudithook(see)
import transformers, transformers.models
from transformers.utils import import_utils
read = list(opened)
packages = importlib.metadata.packages_distributions()
print(json.dumps({
    "opened": len(read),
    "names": sorted(dir(transformers)) + sorted(dir(transformers.models)),
    "structure": sorted(
        (sorted(needed), module, sorted(names))
        for needed, modules in import_utils.define_import_structure(
            os.path.join(os.path.dirname(transformers.__file__), "models"), prefix="models"
        ).items()
        for module, names in modules.items()
    ),
    "packages": {name: sorted(each) for name, each in import_utils.PACKAGE_DISTRIBUTION_MAPPING.items()},
    "all_packages": {name: sorted(each) for name, each in packages.items()},
}))
"""
MANY = 1000


def _imported(cache: Path, *arguments: str, path: Path | None = None) -> dict[str, Any]:
    roots = [*([str(path)] if path else []), python_path()]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(roots)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["packages"] == found["all_packages"]
    return found


def _content(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "opened"}


def test_a_second_import_reads_nothing_again_and_finds_the_same(tmp_path: Path) -> None:
    plain = _imported(tmp_path, "plain")
    first, second = _imported(tmp_path), _imported(tmp_path)
    assert first["opened"] > MANY
    assert second["opened"] < 50
    assert _content(first) == _content(second) == _content(plain)


def test_new_models_and_packages_and_changed_files_are_found(tmp_path: Path) -> None:
    site, cache = tmp_path / "site", tmp_path / "cache"
    _link_transformers(site)
    before = _imported(cache, path=site)
    _add(
        site / "transformers" / "models" / "newest", "configuration_newest.py", '__all__ = ["NewestConfig"]\n'
    )
    _add(site / "newest-1.0.dist-info", "METADATA", "Metadata-Version: 2.1\nName: newest\nVersion: 1.0\n")
    _add(site / "newest-1.0.dist-info", "top_level.txt", "newest_package\n")
    after = _imported(cache, path=site)
    assert "NewestConfig" not in before["names"]
    assert "NewestConfig" in after["names"]
    assert after["packages"]["newest_package"] == ["newest"]
    assert _content(after) == _content(_imported(cache, "plain", path=site))
    assert _imported(cache, path=site)["opened"] < 50
    with (site / "transformers" / "models" / "newest" / "configuration_newest.py").open("r+") as file:
        file.write('__all__ = ["NewestConfig", "LaterConfig"]\n')
    assert "LaterConfig" in _imported(cache, path=site)["names"]


@pytest.mark.parametrize("damage", ["", "[]", '{"origin": 1}', "[" * 100_000])
def test_a_damaged_file_is_read_anew(tmp_path: Path, damage: str) -> None:
    first = _imported(tmp_path)
    kept = list((tmp_path / "stillhouse" / "scans").iterdir())
    assert len(kept) == 2
    for each in kept:
        each.write_text(damage or each.read_text()[:-1000])
    assert _content(_imported(tmp_path)) == _content(first)
    assert _imported(tmp_path)["opened"] < 50


def test_a_home_that_takes_no_files_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert _imported(tmp_path / "file")["opened"] > MANY


def _link_transformers(site: Path) -> None:
    """An installation of transformers whose models are links, so that one can be added."""
    import transformers

    assert transformers.__file__
    real = Path(transformers.__file__).parent
    for folder, origin in (("transformers", real), ("transformers/models", real / "models")):
        (site / folder).mkdir(parents=True)
        for each in origin.iterdir():
            if each.name not in ("models", "__pycache__"):
                (site / folder / each.name).symlink_to(each)


def _add(folder: Path, name: str, content: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content)
