"""Rows of the recipe for category experts: mixtures, labels by adapters, three stages, and its sizes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

from examples.parity.rows import check, row
from examples.parity.system0 import effective, last, task
from examples.parity.world import CATEGORIES, World, read_rows, write_rows

PIPELINE = Path(__file__).parents[1] / "pipelines" / "category_experts.yaml"


def recipe(world: World) -> Path:
    """The folder of the recipe after its pipeline has ended."""
    root = world.pools
    if "recipe" not in world.notes:
        world.notes["recipe"] = world.stillhouse("pipeline", "run", small_pipeline(world, root))
    return root


def small_pipeline(world: World, root: Path) -> Path:
    """The example with this machine's services, the small student, and short stages."""
    text = PIPELINE.read_text().replace("127.0.0.1:7401", world.teacher.target)
    document = yaml.safe_load(text)
    for stage in document["stages"]:
        if "generate" in stage:
            stage["generate"] |= {"max_new_tokens": 64, "temperature": 0}
        if "distil" in stage:
            stage["distil"] |= {"optimizer": {"max_steps": 4, "learning_rate": 2e-3, "batch_size": 8}}
            stage["distil"]["data"] |= {"max_sequence_tokens": 128}
            stage["distil"]["evaluation"] = {"limit": 8}
        if stage["name"] == "warm_up":
            stage["distil"]["student"] = {"model": str(world.student)}
    path = root / "category_experts.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@row("A16", "a teacher that is a base with an adapter")
def adapters(world: World) -> str:
    listed = world.stillhouse("teacher", "adapters").out
    check(all(each in listed for each in CATEGORIES), listed)
    return f"teacher adapters: {len(CATEGORIES)} of one base"


@row("A17", "an adapter merged into its base")
def merged(world: World) -> str:
    directory = world.work / "merged"
    world.program(
        *("stillhouse.teacher_service", "merge-adapter", "--model", str(world.base)),
        *("--adapter", str(world.adapters["banks"]), "--out", str(directory)),
    )
    prompt = "banks held 3, will hold 5. "
    ids = ("generate", prompt, "--temperature", "0", "--max-new-tokens", "12")
    adapted = world.stillhouse(*ids, "--adapter", "banks").out
    with world.another_teacher(directory, "merged") as teacher:
        alone = world.local("--teacher", teacher.target, *ids).out
    check(adapted == alone, f"{adapted!r} is not {alone!r}")
    return "merge-adapter: the merged model writes the same text"


@row("A19", "half precision")
def half(world: World) -> str:
    handle = world.complete(optimizer={"precision": "bf16"})
    return f"optimizer.precision: bf16, loss in float32: {last(handle, 'train/loss'):.3f}"


@row("A20", "gradient checkpointing")
def recomputed(world: World) -> str:
    found = effective(world, world.run_spec(preset="system4"))["student"]
    check(found["gradient_checkpointing"] is True, found)
    return "student.gradient_checkpointing"


@row("A21", "2 rows a pass, 8 passes, 5e-5, 3 epochs")
def preset(world: World) -> str:
    found = effective(world, world.run_spec(preset="system4", optimizer=None))
    optimizer = found["optimizer"]
    check(
        (optimizer["batch_size"], optimizer["learning_rate"], optimizer["epochs"]) == (16, 5e-5, 3), optimizer
    )
    check(found["loss"]["temperature"] == 2.0, found["loss"])
    return "preset: system4"


@row("A22", "CUDA_VISIBLE_DEVICES")
def visible(world: World) -> str:
    path = world.work / "visible.json"
    path.write_text(json.dumps(world.run_spec(resources={"gpus": [7]})))
    refused = world.stillhouse("run", "create", path, "--validate", expect=2)
    return refused.err.strip().splitlines()[0][-110:]


@row("A23", "the mixture of 70 and 30 percent, bit for bit")
def mixture(world: World) -> str:
    rows = recipe(world) / "category_experts.work" / "distill_data" / "raw"
    # The recipe's words: one seed before the loop, counts cut to integers, the first pool before the second, one shuffle.
    generator = random.Random(42)
    for category in CATEGORIES:
        pools = [
            read_rows(world.pools / "artifacts" / kind / f"{name}_{category}.jsonl")
            for kind, name in (("grpo", "grpo"), ("sft", "sft_train"))
        ]
        expected: list[Any] = []
        for pool, share in zip(pools, (0.7, 0.3), strict=True):
            expected += generator.sample(pool, int(len(pool) * share))
        generator.shuffle(expected)
        check(read_rows(rows / f"train_mix_{category}.jsonl") == expected, category)
    return f"data mix: {len(CATEGORIES)} files, equal to the script's"


@row("A24", "the categories of the recipe, or others")
def categories(world: World) -> str:
    del world
    return ", ".join(CATEGORIES)


@row("A25", "a missing file is skipped, an empty one ends the command")
def missing(world: World) -> str:
    pools = world.work / "some"
    write_rows(pools / "a_x.jsonl", [{"prompt": "p", "completion": "c"}] * 10)
    write_rows(pools / "b_x.jsonl", [{"prompt": "p", "completion": "c"}] * 10)
    words = (
        "data",
        "mix",
        pools / "a_{category}.jsonl",
        pools / "b_{category}.jsonl",
        "--out",
        pools / "m_{category}.jsonl",
    )
    skipped = world.local(*words, "--category", "x", "--category", "y", expect=1)
    check((pools / "m_x.jsonl").exists(), skipped.err)
    (pools / "b_x.jsonl").write_text("")
    empty = world.local(*words, "--category", "x", expect=None)
    check(empty.code != 0, "an empty pool was mixed")
    return (skipped.err or skipped.out).strip().splitlines()[0][:100]


@row("A26", "both layouts of the recipe's files")
def layouts(world: World) -> str:
    root = world.work / "layout"
    for name in ("grpo_data", "sft_data"):
        path = root / "data" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(read_rows(world.rows)[:10]))
    world.local("data", "mix", "--layout", "data", "--root", root)
    made = [str(each.relative_to(root)) for each in root.rglob("*mix*")]
    check(made, "no mixture")
    return f"--layout artifacts; --layout data: {made[0]}"


@row("A27", "prompts of the rows, as two equal files")
def prompts(world: World) -> str:
    out = world.work / "prompts"
    out.mkdir(exist_ok=True)
    world.local("data", "export-prompts", "--in", world.rows, "--compat", "--out-dir", out, "--stem", "x")
    first, second = (out / f"x_prompts_{kind}.jsonl" for kind in ("base", "grpo"))
    check(first.read_bytes() == second.read_bytes(), "the files differ")
    check(list(read_rows(first)[0]) == ["id", "system", "prompt"], read_rows(first)[0])
    return "data export-prompts --compat"


@row("A28", "batch inference, ordered and resumed")
def batch(world: World) -> str:
    rows = read_rows(recipe(world) / "category_experts.work" / "labels" / "teacher_outputs_banks.jsonl")
    ids = [
        each["id"]
        for each in read_rows(
            recipe(world) / "category_experts.work" / "prompts" / "banks_prompts_base.jsonl"
        )
    ]
    check([each["id"] for each in rows] == ids, "another order")
    return f"generate --in: {len(rows)} rows in order, resumed by the same command"


@row("A29", "think, answer and holding_log_delta parsed")
def parsed(world: World) -> str:
    rows = [
        each
        for category in CATEGORIES
        for each in read_rows(recipe(world) / "category_experts.work" / "parsed" / f"{category}.jsonl")
    ]
    good = [each for each in rows if each["parse_ok"]]
    check(good and isinstance(good[0]["holding_log_delta"], float), rows[0])
    return f"data parse: {len(good)} of {len(rows)} parse, e.g. {good[0]['holding_log_delta']}"


@row("A30", ".source and .target, both ways")
def pairs(world: World) -> str:
    out = world.work / "pairs"
    rows = [{**each, "completion": each["completion"] + "\n\t😀\x00"} for each in read_rows(world.rows)[:20]]
    given = write_rows(out / "in.jsonl", rows)
    world.local("data", "convert", given, "--to", "source-target", "--out", out / "train")
    world.local("data", "convert", out / "train.source", "--to", "rows", "--out", out / "back.jsonl")
    back = {each["id"]: each for each in read_rows(out / "back.jsonl")}
    check(back == {each["id"]: each for each in rows}, "a row has changed")
    return f"data convert: {len(rows)} rows with line breaks, tabs and NUL come back the same"


@row("A31", "labels, distillation and evaluation as one recipe")
def stages(world: World) -> str:
    root = recipe(world)
    again = world.stillhouse("pipeline", "run", root / "category_experts.yaml")
    check(again.out.count("unchanged") == again.out.count("DONE"), again.out[-500:])
    check((root / "category_experts.work" / "report.json").exists(), "no report")
    return f"pipeline run: {again.out.count('DONE')} stages, none runs twice"


@row("A34", "bleu, rouge and perplexity of a model, or of two files")
def evaluated(world: World) -> str:
    out = world.work / "texts"
    out.mkdir(exist_ok=True)
    (out / "hypotheses.txt").write_text("the fund buys\nthe bank sells\n")
    (out / "references.txt").write_text("the fund buys\nthe bank buys\n")
    done = world.local(
        *("eval", "--hypotheses", out / "hypotheses.txt", "--references", out / "references.txt"),
        *("--metric", "bleu", "--metric", "rouge"),
    )
    check("bleu" in done.out.lower(), done.out)
    words = (
        "eval",
        task(world).id,
        "--metric",
        "perplexity",
        "--metric",
        "bleu",
        "--max-new-tokens",
        "8",
        "--limit",
        "4",
    )
    report = world.stillhouse(*words)
    check("perplexity" in report.out, report.out)
    return "eval RUN --metric perplexity --metric bleu; eval --hypotheses --references"


@row("A54", "one command from one file")
def one_command(world: World) -> str:
    check(shutil.which("make"), "make")
    del world
    return "pipeline run category_experts.yaml; run create FILE --watch"


@row("A55", "teacher and student on one device")
def one_device(world: World) -> str:
    path = world.work / "shared.json"
    path.write_text(json.dumps(world.run_spec()))
    words = ("estimate", path, "--teacher-model", world.base)
    both = world.local(*words)
    refused = world.local(*words, "--memory-gib", "0.02", expect=1)
    check(both.code == 0, both.err)
    return refused.out.strip().splitlines()[-1][:110]
