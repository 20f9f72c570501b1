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

from tests.scheduling import SHARING
from tests.support.processes import SESSION_MARK, TEST_MARK, end_marked
from tests.support.runs import wait_until

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
STOPPED = """
    import time
    from pathlib import Path


    def test_that_is_stopped(trainer_service):
        trainer_service()
        Path("started").touch()
        time.sleep(600)
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


def test_a_suite_that_is_stopped_leaves_no_process(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    arguments = _file(tmp_path, STOPPED.replace('"started"', repr(str(tmp_path / "started"))))
    environment = {**os.environ, ALL: mark, TEST_MARK: ""}
    del environment[SESSION_MARK]
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-n", "1", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as suite:
        wait_until(lambda: (tmp_path / "started").exists() or suite.poll() is not None, "the test's start")
        suite.terminate()
        suite.wait(100)
    assert end_marked(mark, ALL, patience_s=5) == {}


def test_ctrl_c_reaches_programs_where_the_shell_ignores_it() -> None:
    """As in a background job, or under nohup in some shells."""
    ignored = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    done = _pytest("tests/client/terminal/test_progress.py", "-k", "ctrl_c", preexec_fn=ignored)
    assert done.returncode == 0, done.stdout


def _nested(folder: Path, source: str) -> tuple[str, dict[int, str]]:
    """Runs a file of tests; returns the output of pytest and the processes that are left."""
    mark = uuid.uuid4().hex
    # Its processes are its own affair: without the mark of this test, so that they are found by theirs alone.
    done = _pytest(*_file(folder, source), environment={ALL: mark, TEST_MARK: ""})
    left = end_marked(mark, ALL)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return done.stdout, left


def _file(folder: Path, source: str) -> list[str]:
    """Writes a file of tests; returns the arguments that run it with the fixtures of this suite."""
    (folder / "test_nested.py").write_text(textwrap.dedent(source))
    (folder / "empty.ini").write_text("[pytest]\n")
    return ["-c", str(folder / "empty.ini"), "-p", "tests.conftest", str(folder / "test_nested.py")]


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


def test_files_that_share_something_costly_are_dealt_to_one_worker() -> None:
    """A file that a list lacks would start the engine, or the site, a second time in the other worker."""
    words = {
        "teachers": ("vllm_teacher", "second_runner_teacher", "teacher: Teacher", '_teacher")'),
        "worker_engine": ("engine: VllmEngine",),
        "site": ("open_tab",),
    }
    for name, paths in SHARING.items():
        for path in paths:
            assert any(word in (ROOT / path).read_text() for word in words[name]), path
    own = {"test_wire.py", "test_vllm_server.py", "test_classifier.py", "test_cpu_threads.py"}
    slow_alone = {"test_parallelism.py", "test_warm_start.py"}
    using = {
        path.relative_to(ROOT).as_posix()
        for folder in ("teacher_service", "client/web/browser")
        for path in (ROOT / "tests" / folder).rglob("test_*.py")
        if path.name not in own | slow_alone
        and any(word in path.read_text() for several in words.values() for word in several)
    }
    assert using <= {path for paths in SHARING.values() for path in paths}
