"""Fixtures of all tests: tiny real models, real services on free ports; and the rule that nothing installed is skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}.items():
    os.environ.setdefault(_name, _value)

# Programs that tests start some hundred times keep the bytecode of this tree, else each compiles all of it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from tests.support.privileges import NOT_ALLOWED  # noqa: E402
from tests.support.processes import (  # noqa: E402
    SESSION_MARK,
    begin_session,
    end_marked,
    inherit_interrupts,
    no_process_left,
    watched_test,
)
from tests.support.programs import INTERPRETED_TRITON, Program, start_teacher, start_trainer  # noqa: E402
from tests.support.texts import sentences  # noqa: E402

MODEL_FIXTURES = {"hf_teacher", "vllm_teacher", "second_runner_teacher"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "model: starts a model; `make check` leaves it out.")
    config.addinivalue_line(
        "markers", "faults(row): injects the fault of this row of tests/faults/matrix.py."
    )
    config.addinivalue_line(
        "markers",
        "slow: only in `make test-slow`, `make test-compat` and, with `faults`, in `make test-faults`.",
    )
    # By default SIGTERM would end pytest before its fixtures have ended the services that they started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    inherit_interrupts()
    session = begin_session()

    def end_session() -> None:
        """Ends what workers that were cut short have started; their fixtures did not."""
        end_marked(session, SESSION_MARK)

    if session:
        config.add_cleanup(end_session)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadfile":
        return None
    from tests.scheduling import ByFixture

    return ByFixture(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if MODEL_FIXTURES & set(getattr(item, "fixturenames", ())) or {"integration", "faults"} & set(
            item.path.parts
        ):
            item.add_marker(pytest.mark.model)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """A skip fails, unless its reason is "<module or program> is not installed" or "<this> is not allowed on this machine"."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        module = reason.removesuffix(" is not installed")
        not_allowed = reason.endswith(NOT_ALLOWED)  # it was tried
        missing = (
            module != reason and importlib.util.find_spec(module) is None and shutil.which(module) is None
        )
        if not (missing or not_allowed):
            report.outcome = "failed"
            report.longrepr = f"skipped although it can run here: {reason}"


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    with watched_test():
        yield


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """Directories of tiny models; `teacher` and `student` share a tokenizer, `foreign` has another."""

    teacher: Path
    student: Path
    foreign: Path
    adapter_a: Path
    adapter_b: Path
    texts: tuple[str, ...]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    from tests.support.small_models import make_adapter, make_model, make_tokenizer

    root = tmp_path_factory.mktemp("models")
    texts = tuple(sentences(400, seed=1))
    tokenizer = make_tokenizer(texts, root / "tokenizer", 384)
    foreign_tokenizer = make_tokenizer([text.upper() for text in texts], root / "foreign-tokenizer", 320)
    # A wide initialisation makes distributions far from uniform, as those of trained models are.
    teacher = make_model(
        root / "teacher",
        tokenizer_dir=tokenizer,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        seed=1,
        vocab_padding=8,
        initializer_range=0.3,
    )
    student = make_model(
        root / "student",
        tokenizer_dir=tokenizer,
        hidden_size=32,
        num_layers=1,
        num_heads=1,
        seed=2,
        initializer_range=0.1,
    )
    foreign = make_model(
        root / "foreign",
        tokenizer_dir=foreign_tokenizer,
        hidden_size=32,
        num_layers=1,
        num_heads=1,
        seed=3,
        initializer_range=0.3,
    )
    return Models(
        teacher=teacher,
        student=student,
        foreign=foreign,
        adapter_a=make_adapter(root / "adapter-a", teacher, rank=4, seed=4),
        adapter_b=make_adapter(root / "adapter-b", teacher, rank=8, seed=5),
        texts=texts,
    )


@pytest.fixture(scope="session")
def dataset_file(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of 64 rows with `prompt` and `completion`."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for text in models.texts[:64]:
            prompt, completion = text.split(": ", 1)
            file.write(json.dumps({"prompt": prompt + ": ", "completion": completion}) + "\n")
    return path


@pytest.fixture(scope="session")
def hf_teacher(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A `stillhouse-teacher` process with the reference engine; `.target` is where it listens."""
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher,
            engine="hf",
            directory=tmp_path_factory.mktemp("hf-teacher"),
            options=[
                *("--dtype", "float32", "--threads", "1"),
                *("--upload-dir", str(tmp_path_factory.mktemp("hf-uploads"))),
            ],
            environment=mark,
        ) as program,
    ):
        yield program


@pytest.fixture(scope="session")
def vllm_teacher(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A `stillhouse-teacher` process with the vLLM engine; `.target` is where it listens."""
    uploads = str(tmp_path_factory.mktemp("vllm-uploads"))
    with _vllm(models, tmp_path_factory.mktemp("vllm-teacher"), "--upload-dir", uploads) as program:
        yield program


@pytest.fixture(scope="session")
def second_runner_teacher(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A `stillhouse-teacher` process with vLLM's second model runner, the default of GPUs, in Triton's interpreter."""
    directory = tmp_path_factory.mktemp("second-runner-teacher")
    # Few tokens a step, so that prompts of the tests are read in chunks.
    options = ("--max-batch-tokens", "256")
    with _vllm(models, directory, *options, environment=INTERPRETED_TRITON) as program:
        yield program


@contextmanager
def _vllm(
    models: Models, directory: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Program]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher,
            engine="vllm",
            directory=directory,
            options=["--dtype", "float32", *options],
            environment={**mark, **(environment or {})},
        ) as program,
    ):
        yield program


@pytest.fixture
def trainer_service(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts `stillhouse-trainer` processes: `trainer_service(*options, data_dir=None)`; all end with the test."""
    started: list[Program] = []
    with no_process_left() as mark:

        def start(*options: str, data_dir: Path | None = None) -> Program:
            program = start_trainer(
                data_dir or tmp_path / "trainer-data",
                directory=tmp_path / f"trainer-{len(started)}",
                options=["--stop-runs-on-exit", *options],
                environment=mark,
            )
            started.append(program)
            return program

        try:
            yield start
        finally:
            for program in started:
                program.stop()
