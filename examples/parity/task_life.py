"""Rows of the co-training platform: the life of a task, and its troubles."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import httpx

from examples.parity.rows import check, row
from examples.parity.system0 import form, task
from examples.parity.world import World
from stillhouse.client.api import RunHandle, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import Run

PATIENCE_S = 120.0


@row("A35", "states and ids of tasks")
def states(world: World) -> str:
    listed = world.stillhouse("run", "list", "--state", "completed", "--json")
    check(task(world).id in listed.out, listed.out[:300])
    return f"{task(world).id}, COMPLETED"


@row("A36", "create, start, get, progress and complete over HTTP")
def calls(world: World) -> str:
    with httpx.Client(base_url=f"{world.web.target}/model-distillation", timeout=60) as platform:
        created = platform.post("/tasks", json=form(world)).json()
        check(created["code"] == 200, created)
        path = f"/tasks/{created['data']['taskId']}"
        check(
            platform.post(f"{path}/start").json()["data"]["status"] in ("PENDING", "RUNNING"), "not started"
        )
        report = {"currentEpoch": 1, "accuracy": 0.5, "loss": 2.0}
        check(platform.put(f"{path}/progress", params=report).json()["code"] == 200, "no progress")
        check(platform.post(f"{path}/complete").json()["code"] == 409, "complete before its end")
        wait_for(lambda: platform.get(path).json()["data"]["status"] == "COMPLETED", f"{path} is COMPLETED")
        done = platform.post(f"{path}/complete").json()
    check(done["code"] == 200 and done["data"]["progress"] == 100, done)
    request = "6f9619ff-8b86-4d01-b42d-00cf4fc964ff"
    first = world.client.create_run(world.run_spec(), request_id=request)
    check(world.client.create_run(world.run_spec(), request_id=request).name == first.name, "two runs")
    check(first.wait().state == Run.STATE_COMPLETED, first.get().error.message)
    return f"{path}: loss {done['data']['loss']:.2f}; over gRPC a repeated create is one run"


@row("A37", "progress as it happens")
def progress(world: World) -> str:
    task(world)
    watched = world.notes["created"].out.splitlines()
    steps = [line for line in watched if "step" in line]
    check(steps, watched)
    return f"run create --watch: {len(watched)} lines, such as {steps[-1][:60]!r}"


def long_run(world: World) -> RunHandle:
    """A run that is still training."""
    handle = world.client.create_run(
        world.run_spec(
            optimizer={"max_steps": 100_000}, checkpoint={"every_steps": 5}, evaluation={"limit": 2}
        )
    )
    wait_for(lambda: handle.get().progress.step >= 6, f"run {handle.id} trains")
    return handle


def wait_for(condition: Any, what: str) -> None:
    """Returns once `condition` holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        check(time.monotonic() < deadline, f"not in {PATIENCE_S:.0f} s: {what}")
        time.sleep(0.1)


@row("A49", "a killed process is classified, and its run resumed")
def killed(world: World) -> str:
    handle = world.notes["long"] = long_run(world)
    process = json.loads((world.data_dir / handle.name / "process.json").read_text())
    os.kill(process["pid"], signal.SIGKILL)
    wait_for(lambda: handle.get().state == Run.STATE_FAILED, "the run ends")
    reason = handle.get().error.message
    check("137" in reason, reason)
    world.stillhouse("run", "resume", handle.id)
    return str(reason).splitlines()[0][:110]


@row("A38", "stop ends the process")
def stopped(world: World) -> str:
    handle: RunHandle = world.notes.get("long") or long_run(world)
    wait_for(lambda: handle.get().state in (Run.STATE_RUNNING, Run.STATE_STOPPED), "the second attempt runs")
    world.stillhouse("run", "stop", handle.id, "--wait")
    process = json.loads((world.data_dir / handle.name / "process.json").read_text())
    check(not Path(f"/proc/{process['pid']}").exists(), "the process is left")
    check(handle.get().state == Run.STATE_STOPPED, handle.get().state)
    return "run stop --wait: checkpoint, then no process"


@row("A39", "settings are typed; unknown ones are refused")
def unknown(world: World) -> str:
    path = world.work / "typo.json"
    path.write_text(json.dumps({**form(world), "learningRatee": 1}))
    refused = world.stillhouse("run", "create", path, expect=2)
    check("learningRatee" in refused.err, refused.err)
    return refused.err.strip().splitlines()[0][-100:]


@row("A40", "tasks, attempts, history and evaluations are kept")
def history(world: World) -> str:
    database = world.data_dir / "stillhouse.db"
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as store:
        tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    check({"runs", "attempts"} <= set(tables), tables)
    table = world.stillhouse("run", "metrics", task(world).id, "--json").json
    check(table, "no metrics")
    return f"SQLite with {', '.join(sorted(tables)[:6])}; run metrics --json"


@row("A45", "why a task stays where it is")
def pending(world: World) -> str:
    handle = world.client.create_run(
        world.run_spec(
            teachers=[{"targets": ["127.0.0.1:1"]}], retry={"teacher_wait_s": 1, "max_attempts": 1}
        )
    )
    run = handle.wait()
    check(run.state == Run.STATE_FAILED, run.state)
    shown = world.stillhouse("run", "show", handle.id).out
    check("127.0.0.1:1" in shown, shown)
    return str(run.error.message).splitlines()[0][:110]


@row("A46", "a service that cannot be reached")
def unreachable(world: World) -> str:
    done = world.local("--trainer", "127.0.0.1:1", "run", "list", expect=3)
    return done.err.strip()[:110]


@row("A47", "advice when memory is short")
def memory(world: World) -> str:
    path = world.work / "estimate.json"
    path.write_text(json.dumps(world.run_spec(optimizer={"batch_size": 16, "precision": "fp32"})))
    done = world.local("estimate", path, "--memory-gib", "0.01", expect=1)
    return done.out.strip().splitlines()[-1][:110]


@row("A48", "a model that cannot be loaded")
def unloadable(world: World) -> str:
    broken = world.work / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "config.json").write_text("{}")
    try:
        handle = world.client.create_run(world.run_spec(student={"model": str(broken)}))
    except StillhouseError as error:
        return error.message.splitlines()[0][-110:]
    run = handle.wait()
    check(run.state == Run.STATE_FAILED, "a model without a tokenizer was trained")
    return str(run.error.message).splitlines()[0][:110]


@row("A50", "logs of the service and of each try")
def logs(world: World) -> str:
    text = world.stillhouse("run", "logs", task(world).id).out
    check(text, "empty log")
    return f"run logs: {len(text.splitlines())} lines"


@row("A53", "datasets, distribution, quantisation, logs, curves, resumption")
def later(world: World) -> str:
    plot = world.stillhouse("run", "plot", task(world).id).out
    check(plot, "no curve")
    handle: RunHandle = world.notes["long"]
    step = handle.get().progress.step
    world.stillhouse("run", "resume", handle.id)
    wait_for(lambda: handle.get().progress.step > step, "the resumed run trains")
    world.stillhouse("run", "stop", handle.id, "--wait")
    return f"run plot; run resume went on from step {step}"
