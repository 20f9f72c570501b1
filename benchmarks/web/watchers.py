"""CPU time that readers of one run's events cost the run service: `python -m benchmarks.web.watchers`.

A run's process is stopped, and this program writes its metrics in its place, a point every 50 ms, so that nothing else needs the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from tests.student_trainer.runs.api.caller import model_of_no_kind
from tests.support.programs import Program, start_program, start_trainer

INTERVAL_S = 0.05
NOW = "2026-01-01T00:00:00Z"
MARK = "bench/last"
"""Metric that only the last point has."""


def main() -> None:
    """Prints one line for each number of readers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--readers", type=int, nargs="*", default=[0, 1, 200])
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "rows.jsonl").write_text('{"text": "a"}\n')
        web_arguments = [
            "stillhouse.client",
            "web",
            "--listen",
            "127.0.0.1:0",
            "--log-level",
            "warning",
            "--trainer",
        ]
        environment = {"XDG_CONFIG_HOME": folder}
        with (
            start_trainer(
                root / "data", directory=root, options=["--stop-runs-on-exit", "--stop-grace-s", "0"]
            ) as trainer,
            start_program(
                "web", [*web_arguments, trainer.target], directory=root, environment=environment
            ) as web,
        ):
            for readers in options.readers:
                asyncio.run(measure(root, trainer, web, readers, options.seconds))


async def measure(root: Path, trainer: Program, web: Program, readers: int, seconds: float) -> None:
    """Prints the share of a core that both servers used while `readers` read every point of a run."""
    spec = {
        "student": {"model": str(model_of_no_kind(root))},
        "data": {"train": [{"path": str(root / "rows.jsonl")}]},
        "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
    }
    async with httpx.AsyncClient(
        base_url=web.target, timeout=httpx.Timeout(60.0), limits=httpx.Limits(max_connections=None)
    ) as client:
        run = (await client.post("/api/v1/runs", json={"spec": spec})).json()["name"]
        folder = root / "data" / run
        while not (folder / "process.json").exists():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)
        pid = json.loads((folder / "process.json").read_text())["pid"]
        os.kill(pid, signal.SIGSTOP)
        began = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(read(client, run, began)) for _ in range(readers)]
        for _ in tasks:
            await began.acquire()
        processes = [psutil.Process(each.pid) for each in (trainer, web)]
        before, start_s = [sum(each.cpu_times()[:2]) for each in processes], time.monotonic()
        points = await write(folder, seconds)
        counts = await asyncio.gather(*tasks)
        took_s = time.monotonic() - start_s
        shares = [
            100 * (sum(each.cpu_times()[:2]) - used) / took_s
            for each, used in zip(processes, before, strict=True)
        ]
        os.kill(pid, signal.SIGKILL)
        missed = sum(points - each for each in counts)
    print(
        f"{readers:4d} readers, {points} points in {took_s:.0f} s: run service {shares[0]:.1f} % of a core, web server "
        f"{shares[1]:.1f} %; {missed} points missed",
        flush=True,
    )


async def read(client: httpx.AsyncClient, run: str, began: asyncio.Semaphore) -> int:
    """Number of points until the last one."""
    points = 0
    async with client.stream("GET", f"/api/v1/{run}/events") as response:
        kind = ""
        async for line in response.aiter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
                if kind == "run":
                    began.release()
            elif name == "data" and kind == "metrics":
                points += 1
                if MARK in value:
                    break
    return points


async def write(folder: Path, seconds: float) -> int:
    """Writes a point every INTERVAL_S, such as a run with 20 metrics does; returns their number."""
    points = round(seconds / INTERVAL_S)
    start_s = time.monotonic()
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(1, points + 1):
            values = {"train/loss": 1 / step} | {f"train/metric_{index}": float(index) for index in range(19)}
            if step == points:
                values[MARK] = 1.0
            line = {"sequence": step, "attempt": 1, "step": step, "time": NOW, "values": values}
            file.write(json.dumps(line) + "\n")
            file.flush()
            await asyncio.sleep(max(0.0, start_s + step * INTERVAL_S - time.monotonic()))
    return points


if __name__ == "__main__":
    main()
