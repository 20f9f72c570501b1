"""Student step at a large vocabulary: time and memory against full logits, TRL's chunked loss and Liger's fused JSD.

Prints two rows, each for one setting of ours in one run: the smallest memory, and the fastest of the chunk sizes
tried. Beside the speeds stands their bound: a step of the student's body and the matmuls of an exact loss alone.
A third row needs no clock: the tokens that forward passes compute, cut by tokens and cut by rows, over those that are
needed, on rows as long as those of question-and-answer data.
Every pass is a fresh process; passes of a round follow one another, and a method's time is its fastest step of all
rounds, since disturbances of a machine only add. Peers are installed into their own directory; one that cannot be is
shown as n/a.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import timeit
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.student.padding import MAX_RATIO, padding_ratios
from benchmarks.student.sizes import DEFAULT, Sizes

PEERS = ("trl==1.16.0", "liger-kernel==0.8.5")
PEER_METHODS = ("trl_async", "trl_gkd", "liger_jsd")
PEERS_DIR = Path(".bench/student-peers")
TIMEOUT_S = 900.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodPass:
    """A method at a chunk size, in positions; 0 without chunks."""

    method: str
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.method}, chunk {self.chunk}" if self.chunk else self.method


@dataclass(frozen=True, kw_only=True, slots=True)
class PassResult:
    """Time and memory of a pass."""

    seconds: float
    """Seconds of the fastest step."""
    memory_mib: float
    """Peak growth of memory."""
    loss: float


FULL = MethodPass(method="full")
TRL = MethodPass(method="trl_async", chunk=256)
"""A constant of TRL's."""
REQUIRED = {
    "memory_full_over_ours": 10.0,
    "small_speed_vs_full": 2.0,
    "speed_vs_full": 3.0,
    "speed_vs_trl_async": 5.0,
    "fast_memory_full_over_ours": 7.5,
}


@click.command()
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Add ratios and passes to this file."
)
@click.option("--rounds", default=2, show_default=True, help="Fresh processes for each pass.")
@click.option("--steps", default=3, show_default=True, help="Steps of each process.")
@click.option(
    "--small-chunk", default=64, show_default=True, help="Chunk size of the first row, in positions."
)
@click.option(
    "--chunk",
    "chunks",
    multiple=True,
    type=int,
    default=(64, 128, 256, 384),
    show_default=True,
    help="Chunk sizes tried for the second row, in positions.",
)
@click.option("--only", multiple=True, help="Methods to measure; all if not given.")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda for the first GPU.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default=DEFAULT.dtype, show_default=True)
@click.option("--vocabulary", default=DEFAULT.vocabulary, show_default=True)
@click.option(
    "--hidden", default=DEFAULT.hidden, show_default=True, help="Width; 1536 is that of Qwen2.5-1.5B."
)
@click.option("--layers", default=DEFAULT.layers, show_default=True)
@click.option(
    "--heads", default=DEFAULT.heads, show_default=True, help="An even number that divides the width."
)
@click.option(
    "--sequences", default=DEFAULT.sequences, show_default=True, help="Sequences of 512 tokens each."
)
@click.option(
    "--peers-dir",
    type=click.Path(path_type=Path),
    default=PEERS_DIR,
    show_default=True,
    help="Folder of the peers' packages.",
)
@click.option("--install/--no-install", default=True, help="Install the peers where they are missing.")
def main(  # noqa: PLR0917 (click passes them by name)
    json_file: Path | None,
    rounds: int,
    steps: int,
    small_chunk: int,
    chunks: tuple[int, ...],
    only: tuple[str, ...],
    device: str,
    dtype: str,
    vocabulary: int,
    hidden: int,
    layers: int,
    heads: int,
    sequences: int,
    peers_dir: Path,
    install: bool,
) -> None:
    """Measure the student's step."""
    console = Console()
    sizes = Sizes(
        vocabulary=vocabulary,
        sequences=sequences,
        hidden=hidden,
        layers=layers,
        heads=heads,
        device=device,
        dtype=dtype,
    )
    if device == "cpu":
        console.print(_of_matmuls())
    small, *tried = (MethodPass(method="ours", chunk=chunk) for chunk in (small_chunk, *chunks))
    peers = [TRL, MethodPass(method="trl_gkd"), MethodPass(method="liger_jsd", chunk=256)]
    passes = [
        FULL,
        small,
        *tried,
        *(MethodPass(method="products", chunk=each.chunk) for each in tried[-2:]),
        *peers,
    ]
    passes = [each for each in dict.fromkeys(passes) if not only or each.method in only]
    if install and any(each.method in PEER_METHODS for each in passes):
        _install_peers(peers_dir, console)
    found: dict[MethodPass, list[PassResult]] = defaultdict(list)
    missing: dict[MethodPass, str] = {}
    for number in range(rounds):
        for each in passes:
            if each in missing:
                continue
            try:
                found[each].append(measure(each, steps, sizes, peers_dir))
            except RuntimeError as error:
                missing[each] = str(error)
                console.print(f"round {number + 1} of {rounds}: {each}: {error}", soft_wrap=True)
            else:
                one = found[each][-1]
                console.print(
                    f"round {number + 1} of {rounds}: {each}: {one.seconds:.2f} s, {one.memory_mib:.0f} MiB"
                )
        if json_file is not None:
            _save(json_file, _content(found, missing, small, sizes))
    best = {each: _best(all_found) for each, all_found in found.items() if all_found}
    ratios, limits, fast = _ratios(best, small), _limits(best), _fastest(best)
    console.print(_table(passes, best, missing))
    for row, names in (
        (f"smallest memory ({small})", ("memory_full_over_ours", "small_speed_vs_full")),
        (
            f"fastest ({fast or 'not measured'})",
            ("speed_vs_full", "speed_vs_trl_async", "fast_memory_full_over_ours"),
        ),
    ):
        said = ", ".join(
            f"{name} {_said(ratios.get(name))} (>= {REQUIRED[name]:g}"
            + (f"; body and products alone {limits[name]:.2f})" if name in limits else ")")
            for name in names
        )
        console.print(f"{row}: {said}", soft_wrap=True)
    said = ", ".join(f"{name} {ratio:.3f}" for name, ratio in padding_ratios().items())
    console.print(f"computed over needed tokens (<= {MAX_RATIO:.2f} by tokens): {said}", soft_wrap=True)


def _of_matmuls() -> str:
    """Matmul speed of both types on this processor, beside the table's choice."""
    import torch

    from stillhouse.student_trainer.config.settled.matmul_dtype import Processor, matmul_dtype

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(2048, 1024, dtype=dtype), torch.ones(1024, 4096, dtype=dtype)
        return min(timeit.repeat(lambda: left @ right, number=1, repeat=9))

    speed = seconds(torch.float32) / seconds(torch.bfloat16)
    chosen = matmul_dtype("bfloat16", Processor.read())
    return f"matmuls in bfloat16 are {speed:.2f} times as fast as in float32; runs in bf16 use {chosen} here"


def _content(
    found: Mapping[MethodPass, Sequence[PassResult]],
    missing: Mapping[MethodPass, str],
    small: MethodPass,
    sizes: Sizes,
) -> dict[str, Any]:
    """Results so far, for the file."""
    best = {each: _best(all_found) for each, all_found in found.items() if all_found}
    ratios = _ratios(best, small)
    return {
        **{name: ratios.get(name, "n/a") for name in REQUIRED},
        "details": {
            "required": REQUIRED,
            "body_and_products_alone": _limits(best),
            "sizes": asdict(sizes),
            "computed_over_needed_tokens": padding_ratios(),
            "passes": {str(each): asdict(one) for each, one in best.items()},
            "not_available": {str(each): why for each, why in missing.items()},
        },
    }


def _save(path: Path, content: Mapping[str, Any]) -> None:
    """Merges the results into the file, beside those of other benchmarks."""
    before = json.loads(path.read_text()) if path.exists() else {}
    details = {**before.get("details", {}), **content["details"]}
    path.write_text(json.dumps({**before, **content, "details": details}, indent=2) + "\n")


def _install_peers(peers_dir: Path, console: Console) -> None:
    """Installs the peers, once, without dependencies, which this environment has."""
    stamp = peers_dir / ".done"
    if stamp.exists() and stamp.read_text() == " ".join(PEERS):
        return
    peers_dir.mkdir(parents=True, exist_ok=True)
    for peer in PEERS:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        done = subprocess.run(
            [*command, "--target", str(peers_dir), peer], capture_output=True, text=True, check=False
        )
        if done.returncode:
            console.print(f"{peer} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
            return
    stamp.write_text(" ".join(PEERS))


def measure(each: MethodPass, steps: int, sizes: Sizes, peers_dir: Path = PEERS_DIR) -> PassResult:
    """Runs one pass in a fresh process. Raises RuntimeError with the reason if it fails."""
    path = os.pathsep.join([str(peers_dir.resolve()), *sys.path])
    arguments = [each.method, str(each.chunk), str(steps), json.dumps(asdict(sizes))]
    command = [sys.executable, "-m", "benchmarks.student.step_worker", *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no end within {TIMEOUT_S:g} s") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    result = json.loads(done.stdout.splitlines()[-1])
    return PassResult(seconds=min(result["seconds"]), memory_mib=result["memory_mib"], loss=result["loss"])


def _best(found: Sequence[PassResult]) -> PassResult:
    """Fastest step and largest memory over rounds."""
    return PassResult(
        seconds=min(each.seconds for each in found),
        memory_mib=max(each.memory_mib for each in found),
        loss=found[0].loss,
    )


def _fastest(best: Mapping[MethodPass, PassResult]) -> MethodPass | None:
    """Our fastest pass; None if none was measured."""
    return min(
        (each for each in best if each.method == "ours"), key=lambda each: best[each].seconds, default=None
    )


def _ratios(best: Mapping[MethodPass, PassResult], small: MethodPass) -> dict[str, float]:
    """Ratios of the measured passes."""
    full, fast, trl = best.get(FULL), _fastest(best), best.get(TRL)
    ratios: dict[str, float] = {}
    if full and small in best:
        ratios["memory_full_over_ours"] = full.memory_mib / best[small].memory_mib
        ratios["small_speed_vs_full"] = full.seconds / best[small].seconds
    if full and fast:
        ratios["speed_vs_full"] = full.seconds / best[fast].seconds
        ratios["fast_memory_full_over_ours"] = full.memory_mib / best[fast].memory_mib
    if trl and fast:
        ratios["speed_vs_trl_async"] = trl.seconds / best[fast].seconds
    return ratios


def _limits(best: Mapping[MethodPass, PassResult]) -> dict[str, float]:
    """Speed ratios of the bound: the student's body and the matmuls, in the fastest type and chunks."""
    bare = min((each.seconds for name, each in best.items() if name.method == "products"), default=None)
    if bare is None:
        return {}
    others = {"speed_vs_full": FULL, "speed_vs_trl_async": TRL}
    return {name: best[other].seconds / bare for name, other in others.items() if other in best}


def _table(
    passes: list[MethodPass], best: Mapping[MethodPass, PassResult], missing: Mapping[MethodPass, str]
) -> Table:
    table = Table("loss", "step s", "memory MiB", "value", "", title="A student's step, forward and backward")
    for each in passes:
        if each in best:
            one = best[each]
            value, why = f"{one.loss:.4f}", ""
            if each.method == "products":
                value, why = "", "no loss: the body and the products alone"
            table.add_row(str(each), f"{one.seconds:.2f}", f"{one.memory_mib:.0f}", value, why)
        else:
            table.add_row(str(each), "n/a", "n/a", "n/a", missing.get(each, "not measured"))
    return table


def _said(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
