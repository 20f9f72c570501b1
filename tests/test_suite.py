"""The suite itself: it leaves no process behind, and tests of Ctrl-C hold where the shell ignores it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import TEST_MARK, marked_processes

ROOT = Path(__file__).resolve().parents[1]
ALL = "STILLHOUSE_TEST_ALL"
"""Carried by everything that a nested run of pytest starts, whatever its tests do with their own marks."""
BACKGROUND = [sys.executable, "-c", "import time; time.sleep(600)"]
FAILING = f"""
    import subprocess
    from pathlib import Path

    import pytest

    from tests.support.processes import no_process_left
    from tests.support.programs import start_trainer


    def background(**options):
        subprocess.Popen({BACKGROUND!r}, start_new_session=True, **options)


    def test_with_a_service(trainer_service):
        assert trainer_service().target == ""


    def test_with_a_service_of_its_own(tmp_path):
        with no_process_left() as mark:
            start_trainer(tmp_path / "data", directory=tmp_path, environment=mark)
            assert not Path(tmp_path / "data").exists()


    def test_with_a_plain_process():
        background()
        raise KeyError


    @pytest.fixture
    def broken():
        background()
        raise KeyError


    def test_with_a_broken_fixture(broken):
        pass
"""
LEAVING = f"""
    import subprocess


    def test_that_passes():
        subprocess.Popen({BACKGROUND!r})
"""


def test_a_failing_test_leaves_no_process(tmp_path: Path) -> None:
    done, left = _nested(tmp_path, FAILING)
    assert left == {}
    failed = set(re.findall(r"^(?:FAILED|ERROR) .*::test_with_(\w+)", done, re.MULTILINE))
    assert failed == {"a_service", "a_service_of_its_own", "a_plain_process", "a_broken_fixture"}, done


def test_a_process_that_outlives_its_passing_test_is_ended_and_reported(tmp_path: Path) -> None:
    done, left = _nested(tmp_path, LEAVING)
    assert left == {}
    assert "1 passed, 1 error" in done
    assert "processes outlived their test" in done


def test_ctrl_c_reaches_programs_where_the_shell_ignores_it() -> None:
    """As in a background job, or under nohup in some shells."""
    name = "tests/client/terminal/test_progress.py::test_ctrl_c_says_that_a_batch_goes_on_where_it_was"
    done = _pytest(name, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def _nested(folder: Path, source: str) -> tuple[str, dict[int, str]]:
    """Runs a file of tests; returns the output of pytest and the processes that are left."""
    mark = uuid.uuid4().hex
    (folder / "test_nested.py").write_text(textwrap.dedent(source))
    (folder / "empty.ini").write_text("[pytest]\n")
    # Its processes are its own affair: without the mark of this test, so that they are found by theirs alone.
    done = _pytest(
        *("-c", str(folder / "empty.ini"), "-p", "tests.conftest", str(folder / "test_nested.py")),
        environment={ALL: mark, TEST_MARK: ""},
    )
    left = marked_processes(mark, ALL)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return done.stdout, left


def _pytest(
    *arguments: str,
    environment: dict[str, str] | None = None,
    preexec_fn: Callable[[], object] | None = None,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        preexec_fn=preexec_fn,
    )
