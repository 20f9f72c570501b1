"""Imports of a process that will train: no large library that only some runs need, and no second scan of transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stillhouse.protos.child_process import python_path

PROGRAM = """
import sys
from stillhouse.protos.library_imports import MODEL_MODULES, import_modules
from stillhouse.student_trainer.train.__main__ import prepare_libraries
from stillhouse.student_trainer.train.standby import RUN_MODULES
prepare_libraries()
import_modules((*RUN_MODULES, *MODEL_MODULES))
print(*sorted({each.partition(".")[0] for each in sys.modules}))
"""
OF_SOME_RUNS = {
    *("aiohttp", "bitsandbytes", "datasets", "matplotlib", "pandas", "peft", "scipy", "sklearn"),
    *("tensorboard", "tensorflow", "torchvision", "trl", "vllm", "wandb"),
}


def test_a_run_imports_what_every_run_needs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.splitlines()[-1].split())
    assert "torch" in imported
    assert imported & OF_SOME_RUNS == set()
    assert len(list((tmp_path / "stillhouse" / "scans").iterdir())) == 2
