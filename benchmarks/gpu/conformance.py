"""Served log-probabilities against transformers on the same device, in float32 and bfloat16.

The reference is transformers in float32. Beside the teacher's errors stand those of transformers in the teacher's own type, for
in bfloat16 two right programs differ by as much as their order of additions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.teacher.models import SHAPES, make_teacher
from stillhouse.client.teacher.score import ScoreItem
from stillhouse.client.teacher.teacher import Teacher
from tests.support.programs import ProgramError, start_teacher

TOP_K = 64
LENGTH = 200
GPU_SHARE = "0.3"
FLOAT32_LIMIT = 2e-3
"""Largest error of a served log-probability in float32, in nats."""
BFLOAT16_FACTOR = 4.0
"""Most that the mean KL of a teacher in bfloat16 may be, as a multiple of that of transformers in bfloat16."""


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--model", type=click.Path(path_type=Path, exists=True))
@click.option("--rows", default=24, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
def main(*, work: Path, model: Path | None, rows: int, json_file: Path) -> None:
    """Compare both types."""
    work.mkdir(parents=True, exist_ok=True)
    if model is None:
        shape = replace(SHAPES["small"], num_layers=4)
        model = make_teacher(shape, work / "conformance-model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sequences = _sequences(model, rows)
    reference = _reference(model, sequences, torch.float32, device)
    found: dict[str, Any] = {"model": str(model), "device": device, "dtypes": {}}
    for dtype in ("float32", "bfloat16"):
        own = _reference(model, sequences, getattr(torch, dtype), device)
        errors = {
            f"{name}_of_transformers": value
            for name, value in _errors([_top(each) for each in own], reference).items()
        }
        served, engine = _served(model, dtype, sequences, work)
        found["dtypes"][dtype] = errors | {"engine": engine, **_judged(dtype, served, reference, errors)}
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    if any(each.get("problem") for each in found["dtypes"].values()):
        raise SystemExit(1)


def _sequences(model: Path, rows: int) -> list[np.ndarray[Any, Any]]:
    from transformers import AutoConfig

    size = int(AutoConfig.from_pretrained(model).get_text_config().vocab_size)
    generator = np.random.default_rng(0)
    return [generator.integers(16, size, LENGTH - 3 * row % 90).astype(np.int32) for row in range(rows)]


def _reference(
    model: Path, sequences: Sequence[np.ndarray[Any, Any]], dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    """Log-probabilities FLOAT32 [T - 1, V] of each sequence."""
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    found = []
    with torch.no_grad():
        for ids in sequences:
            logits = network(torch.from_numpy(ids).long().unsqueeze(0).to(device)).logits[0, :-1]
            found.append(logits.float().log_softmax(-1).cpu())
    return found


def _top(logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    top = logprobs.topk(TOP_K, -1)
    return top.indices, top.values


def _errors(
    found: Sequence[tuple[torch.Tensor, torch.Tensor]], reference: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Largest error of a log-probability, mean KL(reference || found) over the found ids and their rest, and the share of
    positions with the reference's first token."""
    largest, kl, same, count = 0.0, 0.0, 0, 0
    for (ids, logprobs), truth in zip(found, reference, strict=True):
        known = truth.gather(1, ids.long())
        largest = max(largest, float((known - logprobs).abs().max()))
        p, q = known.double(), logprobs.double()
        rest_p, rest_q = (torch.log1p(-each.exp().sum(-1).clamp(max=1 - 1e-9)) for each in (p, q))
        kl += float((p.exp() * (p - q)).sum() + (rest_p.exp() * (rest_p - rest_q)).sum())
        same += int((ids[:, 0] == truth.argmax(-1)).sum())
        count += len(ids)
    return {"largest": largest, "kl": kl / count, "top_1": same / count}


Rows = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Ids and log-probabilities [T - 1, TOP_K] of each sequence."""


def _served(
    model: Path, dtype: str, sequences: Sequence[np.ndarray[Any, Any]], work: Path
) -> tuple[Rows | str, str]:
    """The teacher's rows, or what went wrong, and its engine."""
    share = ["--gpu-memory-utilization", GPU_SHARE] if torch.cuda.is_available() else []
    options = ["--dtype", dtype, "--max-adapters", "0", *share]
    try:
        program = start_teacher(
            model, engine="vllm", directory=work / f"conformance-{dtype}", options=options
        )
    except ProgramError as error:
        return str(error)[-600:], ""
    rows: Rows = {}
    with program, Teacher(program.target) as teacher:
        engine = teacher.info().engine
        items = (ScoreItem(id=number, token_ids=ids, start=1) for number, ids in enumerate(sequences))
        for answer in teacher.score(items, top_k=TOP_K):
            if answer.error is not None:
                return str(answer.error), engine
            assert answer.distributions is not None
            assert isinstance(answer.id, int)
            rows[answer.id] = (
                torch.from_numpy(np.asarray(answer.distributions.token_ids)),
                torch.from_numpy(np.asarray(answer.distributions.logprobs)),
            )
    return rows, engine


def _judged(
    dtype: str, served: Rows | str, reference: Sequence[torch.Tensor], transformers: dict[str, float]
) -> dict[str, Any]:
    """The errors of the served rows, and "problem" with what is wrong with them, or empty."""
    if isinstance(served, str):
        return {"problem": served}
    errors = _errors([served[number] for number in range(len(reference))], reference)
    problem = ""
    if dtype == "float32" and errors["largest"] > FLOAT32_LIMIT:
        problem = f"a log-probability is off by {errors['largest']:.1e} nats, more than {FLOAT32_LIMIT:g}"
    if dtype == "bfloat16" and errors["kl"] > BFLOAT16_FACTOR * transformers["kl_of_transformers"]:
        problem = f"KL {errors['kl']:.1e} is more than {BFLOAT16_FACTOR:g} times that of transformers"
    return {**errors, "problem": problem}


if __name__ == "__main__":
    main()
