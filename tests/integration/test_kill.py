"""kill -9 of the training process at random moments: every resume goes on from the last checkpoint, and nothing differs."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from stillhouse.client.api import RunHandle, Trainer
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.run_dir import RunDir
from tests.conftest import Models
from tests.support.networks.counting_proxy import Counts, counting_proxy
from tests.support.processes import kill
from tests.support.programs import Program
from tests.support.runs import Service, completed, curve, log_of, small_spec, training_pid, wait_until

KILLS = int(os.environ.get("STILLHOUSE_TEST_KILLS", "6"))
SEED = int(os.environ.get("STILLHOUSE_TEST_KILL_SEED", "20261122"))
STEPS, CHECKPOINT_STEPS, PREFETCH_STEPS, BATCH, TOP_K = 160, 2, 2, 4, 16
LONGEST_DELAY_S = 0.2
INSIDE_SAVE_SHARE = 0.4


@dataclass(frozen=True, kw_only=True, slots=True)
class Killing:
    """One kill, and what was known at that moment."""

    inside_save: bool
    checkpoint: int
    """Last complete checkpoint after it."""
    asked: int
    """Training sequences that this attempt had asked for."""


def spec_for(models: Models, dataset: Path, target: str, seed: int) -> dict[str, Any]:
    spec = small_spec(
        student=models.student,
        train=dataset,
        teacher=target,
        steps=STEPS,
        changes={
            "checkpoint": {"every_steps": CHECKPOINT_STEPS, "keep": 2},
            "loss": {"top_k": TOP_K},
        },
    )
    spec["teachers"][0]["prefetch_steps"] = PREFETCH_STEPS
    spec["optimizer"]["seed"] = seed
    return spec


def kill_and_resume(
    handle: RunHandle, service: Service, counts: Counts, *, kills: int, generator: random.Random
) -> list[Killing]:
    """Kills the run's process `kills` times, each time after a further checkpoint, and resumes it; then it completes."""
    run_dir = RunDir(service.run_path(handle.name))
    done: list[Killing] = []
    for attempt in range(1, kills + 1):
        asked_before = counts.asked(TOP_K)
        last = done[-1].checkpoint if done else 0
        wait_until(lambda: training_pid(service, handle.name, attempt) is not None, "a process")  # noqa: B023
        pid = training_pid(service, handle.name, attempt)
        assert pid is not None
        wait_until(
            lambda: max(run_dir.checkpoints(), default=0) > last or handle_failed(handle),  # noqa: B023
            f"a checkpoint after {last}",
        )
        inside_save = generator.random() < INSIDE_SAVE_SHARE
        if inside_save:
            wait_until(lambda: unfinished_checkpoint(run_dir), "an unfinished checkpoint", patience_s=10)
        else:
            time.sleep(generator.random() * LONGEST_DELAY_S)
        kill(pid)
        run = handle.wait()
        assert run.state == Run.STATE_FAILED, log_of(service, run)
        assert run.attempts[-1].signal == signal.SIGKILL
        done.append(
            Killing(
                inside_save=inside_save,
                checkpoint=max(run_dir.checkpoints()),
                asked=counts.asked(TOP_K) - asked_before,
            )
        )
        handle.resume()
    completed(handle, service)
    return done


def handle_failed(handle: RunHandle) -> bool:
    return handle.get().state == Run.STATE_FAILED


def unfinished_checkpoint(run_dir: RunDir) -> bool:
    """True while a checkpoint is being written: something beside the complete ones, whose names are their steps."""
    with contextlib.suppress(OSError), os.scandir(run_dir.checkpoints_path) as entries:
        return any(not entry.name.isdigit() for entry in list(entries))
    return False


def assert_goes_on_from_checkpoints(run: Run, killings: list[Killing]) -> None:
    """Each attempt began right after the last checkpoint and the teacher was asked again for little."""
    begin = 0
    for number, killing in enumerate(killings):
        assert killing.checkpoint > 0
        assert run.attempts[number + 1].first_step in (0, killing.checkpoint + 1)
        asked_again = begin * BATCH + killing.asked - killing.checkpoint * BATCH
        assert asked_again <= (PREFETCH_STEPS + CHECKPOINT_STEPS) * BATCH, (number, killings)
        begin = killing.checkpoint


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.faults(row=7)
def test_killed_anywhere_a_run_ends_in_the_same_weights_bit_for_bit(
    *,
    hf_teacher: Program,
    service: Service,
    trainer: Trainer,
    models: Models,
    dataset_file: Path,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("kill_seed", SEED)
    seeds = (SEED, SEED + 1)
    kills = [KILLS - KILLS // 2, KILLS // 2]
    undisturbed = [
        trainer.create_run(spec_for(models, dataset_file, hf_teacher.target, seed)) for seed in seeds
    ]
    for handle in undisturbed:
        completed(handle, service)
    with contextlib.ExitStack() as stack:
        proxies = [counting_proxy(hf_teacher.target) for _ in seeds]
        disturbed = [
            trainer.create_run(spec_for(models, dataset_file, stack.enter_context(proxy).target, seed))
            for (proxy, _), seed in zip(proxies, seeds, strict=True)
        ]
        with ThreadPoolExecutor(len(seeds)) as pool:
            futures = [
                pool.submit(
                    kill_and_resume, handle, service, counts, kills=count, generator=random.Random(seed)
                )
                for handle, (_, counts), count, seed in zip(disturbed, proxies, kills, seeds, strict=True)
            ]
            killings = [future.result() for future in futures]
    assert any(killing.inside_save for done in killings for killing in done)
    for calm, killed, done in zip(undisturbed, disturbed, killings, strict=True):
        assert_goes_on_from_checkpoints(killed.get(), done)
        assert curve(killed) == curve(calm)
        expected = load_file(service.run_path(calm.name) / "final" / "model.safetensors")
        weights = load_file(service.run_path(killed.name) / "final" / "model.safetensors")
        assert expected.keys() == weights.keys()
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, expected[name], err_msg=name)


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.faults(row=7)
def test_killed_with_a_vllm_teacher_a_run_ends_in_the_same_held_out_loss(
    vllm_teacher: Program, service: Service, trainer: Trainer, models: Models, dataset_file: Path
) -> None:
    proxy, counts = counting_proxy(vllm_teacher.target)
    with proxy:
        calm = trainer.create_run(spec_for(models, dataset_file, vllm_teacher.target, SEED))
        killed = trainer.create_run(spec_for(models, dataset_file, proxy.target, SEED))
        done = kill_and_resume(killed, service, counts, kills=3, generator=random.Random(SEED))
        completed(calm, service)
    assert_goes_on_from_checkpoints(killed.get(), done)
    assert curve(killed, "eval/kl")[STEPS] == pytest.approx(curve(calm, "eval/kl")[STEPS], abs=1e-3)
    assert curve(killed, "eval/cross_entropy")[STEPS] == pytest.approx(
        curve(calm, "eval/cross_entropy")[STEPS], abs=1e-3
    )
