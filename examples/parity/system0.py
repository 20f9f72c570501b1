"""Rows of the co-training platform: its task form, models and settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from examples.parity.rows import check, row
from examples.parity.world import CATEGORIES, World, encoder_program, read_rows, write_rows
from stillhouse.client.api import RunHandle
from stillhouse.protos.stillhouse.v1.run_pb2 import Run


def effective(world: World, spec: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run of `spec` would have."""
    path = world.work / "validated.json"
    path.write_text(json.dumps(spec))
    done = world.stillhouse("run", "create", path, "--validate", "--json")
    settings: dict[str, Any] = done.json["effective_spec"]
    return settings


def form(world: World, **changes: Any) -> dict[str, Any]:
    """The platform's task form, with its flat names, for a short task."""
    values: dict[str, Any] = {
        "taskName": "TASK_AB12CD34",
        "studentModel": str(world.student),
        "teachers": [{"targets": [world.teacher.target]}],
        "datasetId": dataset(world),
        "epochs": 2,
        "batchSize": 8,
        "gradAccumSteps": 4,
        "learningRate": 1e-3,
        "optimizer": "adamw",
        "lrScheduler": "cosine",
        "weightDecay": 0.01,
        "maxGradNorm": 1.0,
        "autoSaveCheckpoint": True,
        "checkpointInterval": 1,
        "loraRank": 16,
        "targetModules": ["q_proj", "v_proj"],
        "layers": "all",
        "biasTrain": "none",
        "temperature": 3.0,
        "hardLabelWeight": 0.3,
        "softLabelWeight": 0.7,
        "lossType": "kl_div",
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def dataset(world: World) -> str:
    """Name of the uploaded training rows."""
    if "dataset" not in world.notes:
        world.notes["dataset"] = world.stillhouse("data", "push", world.rows).out.split()[0]
    return str(world.notes["dataset"])


def task(world: World) -> RunHandle:
    """The form as a run that has ended."""
    if "task" not in world.notes:
        path = world.work / "form.json"
        path.write_text(json.dumps(form(world)))
        world.notes["created"] = world.stillhouse("run", "create", path, "--watch")
        world.notes["task"] = world.client.run("latest")
    handle: RunHandle = world.notes["task"]
    return handle


@row("A1", "teacher to student, end to end, with LoRA, schedule, checkpoints and final model")
def end_to_end(world: World) -> str:
    run = task(world).get()
    check(run.state == Run.STATE_COMPLETED, run)
    paths = [each.path for each in task(world).artifacts()]
    check(any(each.startswith("checkpoints/") for each in paths), paths)
    check(any(each.startswith("final/") for each in paths), paths)
    return f"run create form.json --watch: {run.progress.step} steps, {len(paths)} files"


@row("A2", "an encoder as teacher and student")
def encoders(world: World) -> str:
    from tests.support.small_models import make_encoder, make_wordpiece

    rows = [
        {"text": each["prompt"], "label": "down" if "-0." in each["completion"] else "up"}
        for each in world.documents[:96]
    ]
    classes = write_rows(world.work / "classes.jsonl", rows)
    words = make_wordpiece([each["text"] for each in rows], world.work / "wordpiece", 200)
    models = [
        make_encoder(
            world.work / name, tokenizer_dir=words, class_names=("down", "up"), num_layers=layers, seed=layers
        )
        for name, layers in (("encoder-teacher", 2), ("encoder-student", 1))
    ]
    with encoder_program(world, models[0]) as teacher:
        handle = world.complete(
            task="sequence_classification",
            student={"model": str(models[1])},
            teachers=[{"targets": [teacher.target]}],
            data={"train": [{"path": str(classes)}]},
        )
    return f"task: sequence_classification, accuracy {last(handle, 'eval/accuracy'):.2f}"


def last(handle: RunHandle, metric: str) -> float:
    """The last value of a metric."""
    return float(handle.metrics(metric)[metric].values[-1])


@row("A3", "task name, teacher, student, and a dataset chosen from the uploaded ones")
def names(world: World) -> str:
    spec = task(world).get().effective_spec
    check(spec.display_name == "TASK_AB12CD34", spec.display_name)
    check(
        spec.data.train[0].path.endswith(dataset(world).removeprefix("datasets/")) or spec.data.train,
        spec.data,
    )
    listed = world.stillhouse("data", "list").out
    check("rows" in listed, listed)
    return f"{dataset(world)[:20]}…, in data list"


@row("A4", "epochs 10, batch 16, learning rate 1e-4")
def sizes(world: World) -> str:
    found = effective(world, world.run_spec(preset="system0", optimizer=None))["optimizer"]
    check((found["epochs"], found["learning_rate"]) == (10, 1e-4), found)
    check(found["batch_size"] == 64, found)
    return "preset: system0 (16 rows a pass, 4 passes an update)"


@row("A5", "optimizers adamw, adam and sgd")
def optimizers(world: World) -> str:
    found = [
        effective(world, form(world, optimizer=each))["optimizer"]["name"]
        for each in ("adamw", "adam", "sgd")
    ]
    check(found == ["adamw", "adam", "sgd"], found)
    return "and paged and 8-bit AdamW"


@row("A6", "schedules cosine and linear")
def schedules(world: World) -> str:
    for each in ("cosine", "linear", "constant"):
        found = effective(world, form(world, lrScheduler=each))["optimizer"]["lr_scheduler"]
        check(found == each, found)
    return "and constant, each with warm-up"


@row("A7", "weight decay 0.01, gradient norm 1.0, 4 accumulated passes")
def accumulation(world: World) -> str:
    found = effective(world, form(world))["optimizer"]
    check((found["weight_decay"], found["max_grad_norm"], found["grad_accum_steps"]) == (0.01, 1.0, 4), found)
    return "the same names; any cut gives the same gradient"


@row("A8", "GPUs by number, several of them")
def devices(world: World) -> str:
    import torch

    if not torch.cuda.is_available():
        path = world.work / "gpus.json"
        path.write_text(json.dumps(form(world, gpuDevices=[0, 1, 2, 3])))
        refused = world.stillhouse("run", "create", path, "--validate", expect=2)
        check("gpus" in refused.err.lower(), refused.err)
    handle = world.complete(resources={"num_processes": 2})
    return f"numbers are checked against the host's; two processes trained run {handle.id}"


@row("A9", "a checkpoint every so many epochs")
def checkpoints(world: World) -> str:
    found = {
        each.path.split("/")[1] for each in task(world).artifacts() if each.path.startswith("checkpoints/")
    }
    check(found, "no checkpoints")
    check(task(world).get().effective_spec.checkpoint.every_epochs == 1, "interval")
    return f"checkpoints {', '.join(sorted(found))}, by epochs, steps or seconds"


@row("A10", "LoRA rank, modules, layers and biases")
def lora(world: World) -> str:
    found = task(world).get().effective_spec.student.lora
    check((found.rank, list(found.target_modules), found.bias) == (16, ["q_proj", "v_proj"], "none"), found)
    config = json.loads((pulled(world) / "adapter" / "adapter_config.json").read_text())
    check(config["r"] == 16, config)
    return "as PEFT writes them"


def pulled(world: World) -> Path:
    """The task's final model, downloaded."""
    directory = world.work / "final"
    if not directory.exists():
        world.stillhouse("run", "pull", task(world).id, "--to", directory)
    return directory


@row("A11", "temperature")
def temperature(world: World) -> str:
    check(task(world).get().effective_spec.loss.temperature == 3.0, "temperature")
    return "exact over the whole vocabulary"


@row("A12", "weights of hard and soft labels")
def weights(world: World) -> str:
    loss = task(world).get().effective_spec.loss
    check((loss.hard_weight, loss.terms[0].weight) == (0.3, 0.7), loss)
    return "two weights, with any sum"


@row("A13", "alpha as the share of the soft labels")
def alpha(world: World) -> str:
    loss = effective(world, form(world, alpha=0.25, hardLabelWeight=None, softLabelWeight=None))["loss"]
    check((loss["terms"][0]["weight"], loss["hard_weight"]) == (0.25, 0.75), loss)
    return "alpha: 0.25 is 0.25 soft and 0.75 hard"


@row("A14", "losses kl_div and MSE")
def losses(world: World) -> str:
    handle = world.complete(loss={"terms": [{"divergence": "mse"}]})
    return f"kl_div in the task, mse in run {handle.id}, eight more divergences"


@row("A15", "a model by path or by hub id")
def models(world: World) -> str:
    path = world.work / "absent.json"
    path.write_text(json.dumps(form(world, studentModel="./no/such/model")))
    refused = world.stillhouse("run", "create", path, expect=None, HF_HUB_OFFLINE="1")
    check(refused.code != 0, "a model that is nowhere was accepted")
    return refused.err.strip().splitlines()[0][-110:]


@row("A33", "accuracy, loss, epoch and progress")
def metrics(world: World) -> str:
    keys = task(world).metrics().keys()
    for each in ("train/loss", "eval/agreement", "eval/kl", "eval/perplexity"):
        check(each in keys, sorted(keys))
    progress = task(world).get().progress
    check(progress.step == progress.total_steps > 0, progress)
    return f"{len(keys)} metrics, step {progress.step} of {progress.total_steps}"


@row("A41", "the advanced form as JSON, with a schema")
def advanced(world: World) -> str:
    schema = json.loads(world.local("run", "schema").out)
    sections = schema["$defs"]["RunSpec"]["properties"]
    check("optimizer" in sections, sections)
    return f"run create form.json; run schema: {len(sections)} fields at the top"


@row("A42", "one file of settings, or the environment")
def settings(world: World) -> str:
    done = world.command(
        [
            *("env", f"STILLHOUSE_TRAINER={world.trainer.target}"),
            *("python", "-m", "stillhouse.client"),
            "run",
            "list",
        ],
        PATH=f"{Path(os.sys.executable).parent}:{os.environ['PATH']}",  # type: ignore[attr-defined]
    )
    check(task(world).id in done.out, done.out)
    return (
        "STILLHOUSE_TRAINER and ~/.config/stillhouse/config.toml; --data-dir and --allow-root of the services"
    )


@row("A43", "options of the programs, and a test of oneself")
def options(world: World) -> str:
    for module in ("teacher_service", "student_trainer.runs", "client"):
        check("--help" in world.program(f"stillhouse.{module}", "--help").out, module)
    done = world.stillhouse("doctor", expect=None)
    check("FAIL" not in done.out, done.out)
    return "--help of three programs; doctor"


@row("A44", "installation and versions")
def versions(world: World) -> str:
    return f"make setup; {world.local('version').out.strip().splitlines()[0]}"


@row("A51", "memory before a run")
def guide(world: World) -> str:
    path = world.work / "estimate.json"
    path.write_text(json.dumps(world.run_spec()))
    done = world.local("estimate", path)
    return f"estimate: {done.out.strip().splitlines()[-1][:110]}"


@row("A52", "a source of rows of one's own")
def custom(world: World) -> str:
    package = world.work / "plugin"
    info = package / "parity_rows-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parity-rows\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[stillhouse.datasets]\nparity = parity_rows:rows\n")
    (package / "parity_rows.py").write_text(
        "def rows(argument, *, split, config):\n    for i in range(3):\n        yield {'prompt': f'{argument} {i}', 'completion': ' x'}\n"
    )
    done = world.local_with(package, "data", "inspect", "parity:banks", "--json")
    check(done.json["rows"] == 3, done.out)
    return "entry point stillhouse.datasets: 3 rows"


def quantised(world: World) -> str:
    """Answer of a teacher in 8 bits."""
    with world.another_teacher(world.base, "teacher-8bit", "--quantization", "int8") as teacher:
        done = world.local(
            "--teacher", teacher.target, "generate", "banks held 3, will hold 5. ", "--max-new-tokens", "8"
        )
    return done.out.strip()[:40]


@row("A18", "a teacher in 8 bits")
def eight_bits(world: World) -> str:
    return f"--quantization int8 (bitsandbytes) wrote {quantised(world)!r}"


@row("A32", "a final model that others load")
def deployable(world: World) -> str:
    from transformers import AutoModelForCausalLM

    merged = next(path.parent for path in pulled(world).rglob("config.json"))
    model = AutoModelForCausalLM.from_pretrained(merged)
    check(read_rows(world.rows), "rows")
    check(len(CATEGORIES) == 7, "categories")
    return f"run pull, then transformers: {model.num_parameters():,} parameters"
