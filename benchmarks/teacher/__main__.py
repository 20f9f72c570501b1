"""Teacher throughput, as ratios to its own engine, to vLLM's servers, to TRL's client and to transformers.

All sides serve the same random model on this machine and run at once; within a round they take turns, in an order
that is reversed from round to round. Ratios are taken within rounds.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.teacher.models import MAX_SEQUENCE_TOKENS, SHAPES
from benchmarks.teacher.passes import num_cores
from benchmarks.teacher.peers.environment import TRL, VLLM_GRPC, Peers, prepare
from benchmarks.teacher.ratios import RATIOS, RatioResult, as_json, ratio_result, table
from benchmarks.teacher.rounds import Measured, Options, is_missing, measure
from benchmarks.teacher.servers import EngineSettings
from examples.demo.__main__ import signals_as_exceptions
from tests.support.programs import ProgramError


def outcomes_of(
    measured: Mapping[str, Measured], options: Options, peers: Peers
) -> dict[str, RatioResult | None]:
    """Every requested ratio; None where a peer cannot run."""
    found: dict[str, RatioResult | None] = {}
    for ratio in options.selected():
        model = measured.get(ratio.model)
        found[ratio.name] = (
            ratio_result(ratio, model.result) if model is not None and not is_missing(ratio, peers) else None
        )
    return found


def _details(measured: Mapping[str, Measured], peers: Peers, options: Options) -> dict[str, Any]:
    return {
        "machine": {
            "processor": platform.processor(),
            "cores": num_cores(),
            "on_cpu": options.settings.on_cpu,
        },
        "missing_peers": peers.missing,
        "models": {
            name: {
                "engine": each.engine,
                "commands": each.commands,
                "concurrencies": each.concurrencies,
                "failures": each.failures,
                "costs_s_per_token": asdict(each.result.costs) if each.result.costs else None,
                "rounds": [
                    {key: asdict(taken) for key, taken in passes.items()} for passes in each.result.rounds
                ],
            }
            for name, each in measured.items()
        },
    }


@click.command()
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the ratios and every pass here."
)
@click.option(
    "--models",
    default="small,wide,qwen",
    show_default=True,
    help="Some of small, wide, qwen and, for a GPU, qwen7b.",
)
@click.option("--only", default="", help="Names of ratios, with commas.  [default: all]")
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Largest number of rounds."
)
@click.option(
    "--minutes",
    type=float,
    default=20.0,
    show_default=True,
    help="Total time; a round that would exceed it is not started.",
)
@click.option(
    "--scale", type=float, default=1.0, show_default=True, help="Factor on the sequences of a pass."
)
@click.option("--length", type=click.IntRange(16, MAX_SEQUENCE_TOKENS - 1), help="Tokens of a sequence.")
@click.option(
    "--threads", type=int, default=0, help="Threads of an engine on a CPU.  [default: vLLM's choice]"
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "float16"]),
    help="Type of all models.  [default: bfloat16 where the device is faster in it, else float32]",
)
def main(
    *,
    json_file: Path | None,
    models: str,
    only: str,
    rounds: int,
    minutes: float,
    scale: float,
    length: int | None,
    threads: int,
    dtype: str | None,
) -> None:
    """Print the teacher's throughput as ratios to others on the same model and machine."""
    import torch

    if importlib.util.find_spec("vllm") is None:
        raise click.ClickException("the comparison needs vLLM: install stillhouse[teacher] or [teacher-cpu].")
    options = Options(
        models=_names(models, tuple(SHAPES), "--models"),
        only=frozenset(_names(only, tuple(ratio.name for ratio in RATIOS), "--only"))
        if only
        else frozenset(),
        rounds=rounds,
        minutes=minutes,
        settings=EngineSettings(
            dtype=dtype or native_dtype(), on_cpu=not torch.cuda.is_available(), threads=threads
        ),
    )
    begin = time.monotonic()

    def log(line: str) -> None:
        click.echo(f"[{time.monotonic() - begin:5.0f} s] {line}", err=True)

    measured: dict[str, Measured] = {}
    problems: list[str] = []
    peers = Peers(python=Path(), missing={})

    def keep(name: str, found: Measured) -> None:
        measured[name] = found
        _write(measured, options, peers, json_file)

    interrupted = False
    try:
        with signals_as_exceptions(), tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as directory:
            peers = prepare(log, options.requirements())
            for name in options.models:
                shape = SHAPES[name]
                shape = replace(
                    shape,
                    num_sequences=max(4, round(shape.num_sequences * scale)),
                    length=length or shape.length,
                )
                try:
                    result = measure(shape, options, peers, Path(directory), log, keep=partial(keep, name))
                except ProgramError as error:  # results of the other models are worth keeping
                    problems.append(f"{name}: {error}")
                    continue
                if result is not None:
                    measured[name] = result
                    problems += [f"{name}, {key}: {why}" for key, why in result.failures.items()]
                    problems += [f"{name}, the teacher's log ends with:\n{result.log}"] if result.log else []
    except KeyboardInterrupt:
        interrupted = True
    _show(measured, options, peers, time.monotonic() - begin)
    _write(measured, options, peers, json_file)
    if interrupted:
        raise click.ClickException(
            "interrupted: the table has the complete rounds; all started processes have ended"
        )
    if problems:
        raise click.ClickException("\n".join(problems))


def _write(measured: Mapping[str, Measured], options: Options, peers: Peers, json_file: Path | None) -> None:
    """Writes the results so far; a ratio not measured, though its peer can run, is null."""
    if json_file is not None:
        found = outcomes_of(measured, options, peers)
        content = as_json(found, _details(measured, peers, options))
        for ratio in options.selected():
            if found[ratio.name] is None and not is_missing(ratio, peers):
                content[ratio.name] = None
        json_file.write_text(json.dumps(content, indent=2) + "\n")


def _show(measured: Mapping[str, Measured], options: Options, peers: Peers, seconds: float) -> None:
    found = outcomes_of(measured, options, peers)
    console = Console(width=170)
    where = f"{num_cores()} cores" if options.settings.on_cpu else "GPU"
    console.print(table(found, f"Teacher, {options.settings.dtype}, {where}, {seconds / 60:.0f} minutes"))
    console.print(
        f"other's: engine = the teacher's engine without logprobs; vllm {_vllm()}; {TRL}; {VLLM_GRPC}; "
        f"transformers {version('transformers')}",
        highlight=False,
    )
    for name, each in measured.items():
        console.print(
            f"{name}: teacher {each.engine}; best concurrencies {each.concurrencies}", highlight=False
        )
        for command in each.commands.values():
            console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
    for requirement, reason in peers.missing.items():
        console.print(f"{requirement} cannot run here: {reason}", highlight=False, markup=False)


def _vllm() -> str:
    import vllm

    return str(vllm.__version__)


def native_dtype() -> str:
    """bfloat16 on a GPU, and on a processor known to compute faster in it than in float32; the same for all sides."""
    import torch

    from stillhouse.student_trainer.config.settled.matmul_dtype import Processor, matmul_dtype

    return "bfloat16" if torch.cuda.is_available() else matmul_dtype("bfloat16", Processor.read())


def _names(value: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise click.BadParameter(
            f"{', '.join(wrong) or value!r} is none of {', '.join(known)}.", param_hint=option
        )
    return names


if __name__ == "__main__":
    main()
