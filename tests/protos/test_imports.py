"""Imports of protos stay light: neither torch nor another program."""

import subprocess
import sys
from pathlib import Path

from stillhouse import protos

ROOT = Path(protos.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
    if path.stem != "__init__"
)
HEAVY = (
    "torch",
    "transformers",
    "vllm",
    "peft",
    "accelerate",
    "pyarrow",
    "stillhouse.teacher_service",
    "stillhouse.student_trainer",
    "stillhouse.client",
)


def test_every_module_of_the_contract_imports_without_anything_heavy() -> None:
    program = (
        f"import importlib, sys\nfor name in {MODULES}: importlib.import_module('stillhouse.protos.' + name)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
