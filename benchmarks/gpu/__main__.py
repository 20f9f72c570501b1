"""Everything that needs a GPU, in one run of at most ten minutes, which installs nothing.

Models are made on the spot or handed over. Each part is a process of its own with a limit, so that one that fails or hangs
leaves the others; what it had written counts. On a CPU the small form runs, which shows that the parts work and says which
statements stay unproven.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.end_to_end.processes import run_process, tail
from benchmarks.gpu.parts import PARTS, Handed, Part, Size, results_of

BUDGET_S = 600.0
LEAST_S = 15.0
"""Seconds below which a part is not begun."""
UNPROVEN = (
    "No GPU here: what stays unproven is speed on a GPU, CUDA graphs, asynchronous scheduling, kernels in Triton that run "
    "compiled and not interpreted, and memory of the device."
)
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path(".bench/gpu"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything to this file.")
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True),
    help="Model of the conformance.  [default: random]",
)
@click.option(
    "--peers", type=click.Path(path_type=Path, exists=True), help="Folder of packages with TRL and Liger."
)
@click.option(
    "--trl-python",
    type=click.Path(path_type=Path, exists=True),
    help="Python with TRL, for the distillation beside ours.",
)
@click.option(
    "--part", "chosen", multiple=True, type=click.Choice([each.name for each in PARTS]), help="Some parts."
)
@click.option("--small", is_flag=True, help="The small form, also on a GPU.")
@click.option("--budget", "budget_s", default=BUDGET_S, show_default=True, help="Seconds for all parts.")
def main(
    *,
    work: Path,
    json_file: Path | None,
    model: Path | None,
    peers: Path | None,
    trl_python: Path | None,
    chosen: Sequence[str],
    small: bool,
    budget_s: float,
) -> None:
    """Check Stillhouse on this machine's GPU."""
    import torch

    console = Console(soft_wrap=True)
    on_gpu = torch.cuda.is_available()
    size: Size = "full" if on_gpu and not small else "small"
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    console.print(f"{device}, torch {torch.__version__}, form {size}")
    handed = Handed(work=work.resolve(), model=model, peers=peers, trl_python=trl_python)
    until = time.monotonic() + budget_s
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "size": size, "parts": {}}
    for part in PARTS:
        if chosen and part.name not in chosen:
            continue
        if size == "small" and part.is_large and not chosen:
            continue
        found["parts"][part.name] = _run(part, size, handed, until - time.monotonic(), console)
        if json_file is not None:
            json_file.write_text(json.dumps(found, indent=2) + "\n")
    _report(console, found)
    if not on_gpu:
        console.print(UNPROVEN)
    sys.exit(int(any(each["problem"] for each in found["parts"].values())))


def _run(part: Part, size: Size, handed: Handed, left_s: float, console: Console) -> dict[str, Any]:
    if left_s < LEAST_S:
        return {"problem": "not begun: the time was over", "seconds": 0.0, "results": None}
    folder = handed.work / part.name
    folder.mkdir(parents=True, exist_ok=True)
    json_file, log = folder / "results.json", folder / "log"
    json_file.unlink(missing_ok=True)
    limit_s = min(part.limit_s if size == "full" else left_s, left_s)
    console.print(f"{part.name} …")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    code, seconds = run_process(
        part.command(size, handed, json_file),
        log=log,
        limit_s=limit_s,
        environment={**QUIET, "PYTHONPATH": path},
    )
    results = results_of(json_file)
    problem = ""
    if code is None:
        problem = f"stopped after {seconds:.0f} s"
    elif results is None:
        problem = f"ended with {code}: {tail(log)}"
    console.print(f"{part.name}: {seconds:.0f} s{'; ' if problem else ''}{problem}")
    return {"problem": problem, "seconds": seconds, "results": results}


def _report(console: Console, found: dict[str, Any]) -> None:
    console.rule(f"Stillhouse on {found['device']}, form {found['size']}")
    for part in PARTS:
        each = found["parts"].get(part.name)
        if each is None:
            continue
        console.print(f"{part.name}: {part.title}, {each['seconds']:.0f} s", highlight=False)
        lines = list(part.lines(each["results"])) if each["results"] else []
        for what, figure in [*lines, *([("problem", each["problem"])] if each["problem"] else [])]:
            console.print(f"  {what}: {figure}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
