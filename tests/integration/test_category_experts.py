"""The recipe of the category experts, killed once in each stage, makes what it makes undisturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from examples.parity.system4 import small_pipeline
from examples.parity.world import CATEGORIES, World

PATIENCE_S = 600.0
NAMES = {"mix", "prompts", "labels", "parsed", "kept", "warm_up", "student", "report"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        world = World(work=tmp_path_factory.mktemp("experts"), engine="hf", stack=stack)
        assert world.teacher.target  # both services start here, and outlive the test
        assert world.trainer.target
        yield world


def start(world: World, file: Path) -> subprocess.Popen[bytes]:
    services = ("--trainer", world.trainer.target, "--teacher", world.teacher.target)
    words = [sys.executable, "-m", "stillhouse.client", *services, "pipeline", "run", str(file)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)


def running(work: Path) -> dict[str, str]:
    """The stage that runs, if one does, with its run."""
    path = work / "pipeline.json"
    if not path.exists():
        return {}
    stages = json.loads(path.read_text())["stages"]
    return {name.split("[")[0]: each["run"] for name, each in stages.items() if each["state"] == "RUNNING"}


def kill(process: subprocess.Popen[bytes], world: World, run: str) -> None:
    """Ends the pipeline and its command with SIGKILL, and the training process of its run, if it has one."""
    children = psutil.Process(process.pid).children(recursive=True)
    for each in (psutil.Process(process.pid), *children):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    record = world.data_dir / "runs" / run / "process.json"
    if run and record.exists():
        with suppress(ProcessLookupError):
            os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)


def table(first: Path, second: Path, killed: Mapping[str, int]) -> str:
    """Stages of a recipe that ran undisturbed, and that was killed, with the time of their last try: `pytest -s` shows it."""
    stages = [json.loads((each / "pipeline.json").read_text())["stages"] for each in (first, second)]
    lines = [
        "",
        "| stage | of them | killed | s undisturbed | s of the last try | same outputs |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(each.split("[")[0] for each in stages[0]):
        own = [[each[key] for key in each if key.split("[")[0] == name] for each in stages]
        undisturbed, resumed = (sum(each["ended_at"] - each["started_at"] for each in some) for some in own)
        same = all(one["outputs"] == other["outputs"] for one, other in zip(*own, strict=True))
        lines.append(
            f"| {name} | {len(own[0])} | {killed.get(name, 0)} | {undisturbed:.1f} | {resumed:.1f} | {'yes' if same else 'no'} |"
        )
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(1800)
def test_the_recipe_killed_in_each_stage_makes_the_same(world: World) -> None:
    file = small_pipeline(world, world.pools)
    undisturbed = start(world, file)
    assert undisturbed.wait(PATIENCE_S) == 0
    shutil.move(world.pools / "category_experts.work", world.pools / "undisturbed")

    killed: Counter[str] = Counter()
    deadline = time.monotonic() + 2 * PATIENCE_S
    process = start(world, file)
    while process.poll() is None or process.returncode != 0:
        assert time.monotonic() < deadline, f"killed in {sorted(killed)}"
        if process.poll() is not None:
            process = start(world, file)
        for name, run in running(world.pools / "category_experts.work").items():
            is_run = name in {"warm_up", "student"}
            if name not in killed and process.poll() is None and (run or not is_run):
                killed[name] += 1
                kill(process, world, run)
        time.sleep(0.02)
    # The shortest stages may end between two looks; every kind is met.
    assert killed.keys() >= {"labels", "warm_up", "student", "report"}, killed
    assert killed.keys() <= NAMES

    first, second = world.pools / "undisturbed", world.pools / "category_experts.work"
    print(table(first, second, killed))  # noqa: T201 - for docs/log.md
    for category in CATEGORIES:
        for part in (f"distill_data/raw/train_mix_{category}.jsonl", f"kept/{category}.jsonl"):
            assert (first / part).read_bytes() == (second / part).read_bytes(), part
    weights = [path.relative_to(first) for path in (first / "student").rglob("*.safetensors")]
    assert weights
    for path in weights:
        assert (first / path).read_bytes() == (second / path).read_bytes(), path
