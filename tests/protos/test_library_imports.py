"""Imports without the collector of cycles: it is off for their time alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stillhouse.protos.child_process import python_path

TOLD = """
import gc
from stillhouse.protos.library_imports import import_modules
import_modules(["during"])
import during
assert not during.ENABLED
assert gc.isenabled()
assert gc.get_freeze_count() > 1000
try:
    import_modules(["missing_module"])
except ImportError:
    assert gc.isenabled()
"""


def test_the_collector_is_off_while_modules_are_imported(tmp_path: Path) -> None:
    (tmp_path / "during.py").write_text("import gc\nENABLED = gc.isenabled()\n")
    done = subprocess.run(
        [sys.executable, "-c", TOLD],
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), python_path()])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
