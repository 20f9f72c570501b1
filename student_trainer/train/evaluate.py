"""How near the student is to its teacher and to the text on held-out rows; the teacher is asked for them once in a run."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import structlog
import torch
from torch import Tensor

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.schema import LossConfig
from stillhouse.student_trainer.run_dir import RunDir, write_whole
from stillhouse.student_trainer.train.batching.collate import ScoredExample, collate
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.loss.alm import chunk_objective
from stillhouse.student_trainer.train.loss.functional import cross_entropy, forward_kl
from stillhouse.student_trainer.train.loss.fused import Positions
from stillhouse.student_trainer.train.loss.sparse import SparseTargets
from stillhouse.student_trainer.train.loss.text_logprobs import text_logprobs_of
from stillhouse.student_trainer.train.process.waiting import Patience
from stillhouse.student_trainer.train.student.lm_head import Head
from stillhouse.student_trainer.train.student.student import Student
from stillhouse.student_trainer.train.teacher.answers import Answers

log = structlog.get_logger()

WINDOW_SEQUENCES = 64
"""Held-out rows in flight to the teacher."""
_ARRAYS = ("token_ids", "logprobs", "target_logprobs", "log_tail")


class Autocast(Protocol):
    """Enters the precision in which the student computes."""

    def __call__(self) -> AbstractContextManager[object]: ...


def evaluate(
    student: Student,
    scored: Sequence[ScoredExample],
    *,
    batch_size: int,
    device: torch.device,
    autocast: Autocast,
    vocab_size: int,
    total: Callable[[Mapping[str, float]], Mapping[str, float]] = dict,
    chunk_loss: LossConfig | None = None,
) -> dict[str, float]:
    """Means over held-out tokens, at temperature 1, by metric name; nothing is drawn at random.

    `scored` may be a part of them, where several processes share the work; `total` adds up the sums of all.

    eval/kl: KL(teacher || student) on the teacher's top-k and the tail, a lower bound of the full one. eval/agreement:
    share of tokens where the student's likeliest token is the teacher's. These two only where there are answers.
    eval/alm: the terms of `chunk_loss`, as a mean over the chunks of text that teacher and student have in common.
    """
    sums: Counter[str] = Counter()
    head = Head(student)
    was_training = student.model.training
    student.model.eval()
    try:
        for first in range(0, len(scored), batch_size):
            batch = collate(scored[first : first + batch_size], reduction="token_mean", device=device)
            sums["tokens"] += batch.num_targets
            sums["answers"] += batch.targets is not None
            text = torch.zeros(1, batch.num_targets, device=device)
            with torch.no_grad(), autocast():
                for rows, logits in head.logit_chunks(batch):
                    sums.update(_chunk(logits, batch.positions.rows(rows), vocab_size))
                    if batch.chunks is not None:
                        text[:, rows] = text_logprobs_of(logits, batch.target_ids[:, rows])
            if batch.chunks is not None and chunk_loss is not None:
                summed = chunk_objective(
                    text, batch.weights, batch.chunks, replace(chunk_loss, hard_weight=0)
                )
                sums.update({"alm": summed.loss_sum.item(), "chunks": batch.chunks.weights.sum().item()})
    finally:
        student.model.train(was_training)
    whole = total({name: float(value) for name, value in sums.items()})
    names = ("cross_entropy", "kl", "agreement") if whole["answers"] else ("cross_entropy",)
    means = {f"eval/{name}": whole[name] / whole["tokens"] for name in names}
    if whole.get("chunks"):
        means["eval/alm"] = whole["alm"] / whole["chunks"]
    # Beyond this exponent no float holds the perplexity.
    means["eval/perplexity"] = math.exp(min(means["eval/cross_entropy"], 700.0))
    means["eval/tokens"] = whole["tokens"]
    return means


def _chunk(logits: Tensor, here: Positions, vocab_size: int) -> dict[str, Any]:
    """Sums over some targets, whose logits are [1, n, V]."""
    found = {"cross_entropy": cross_entropy(logits, here.target_ids, here.weights).loss_sum.item()}
    if isinstance(here.targets, SparseTargets):
        kl = forward_kl(logits, here.targets, here.weights, vocab_size=vocab_size)
        agrees = logits.argmax(-1) == here.targets.token_ids[..., 0]
        found |= {"kl": kl.loss_sum.item(), "agreement": float(agrees.sum().item())}
    return found


def ask(examples: Sequence[Example], stream: Answers, patience: Patience) -> list[ScoredExample]:
    """The examples with the teacher's answers. Raises what `Answers.take` raises."""
    scored: list[ScoredExample] = []
    asked = 0
    for sequence_id, example in enumerate(examples):
        while asked < min(sequence_id + WINDOW_SEQUENCES, len(examples)):
            ahead = examples[asked]
            token_ids, start = ahead.asked
            stream.submit(asked, token_ids, start, ahead.place, teacher=ahead.teacher)
            asked += 1
        scored.append(ScoredExample(example=example, answer=stream.take(sequence_id, patience)))
    return scored


def load_answers(run_dir: RunDir, examples: Sequence[Example], top_k: int) -> list[ScoredExample] | None:
    """The answers that this run's teacher gave before; None if there are none, or not for these examples."""
    path = run_dir.eval_targets_path / "answers.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) != _key(examples, top_k):
                return None
            arrays = {name: file[name] for name in _ARRAYS}
            bounds = file["bounds"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("stored answers for held-out rows cannot be read and are asked for again", why=str(error))
        return None
    return [
        ScoredExample(
            example=example,
            answer=Distributions(
                start=example.asked[1], **{name: array[begin:end] for name, array in arrays.items()}
            ),
        )
        for example, begin, end in zip(examples, bounds[:-1], bounds[1:], strict=True)
    ]


def store_answers(run_dir: RunDir, scored: Sequence[ScoredExample], top_k: int) -> None:
    """Keeps the answers for later evaluations and attempts of the run."""
    answers = [each.answer for each in scored if each.answer is not None]
    arrays = {name: np.concatenate([getattr(answer, name) for answer in answers]) for name in _ARRAYS}
    bounds = np.cumsum([0, *(answer.num_rows for answer in answers)])
    buffer = io.BytesIO()
    key = np.array(_key([each.example for each in scored], top_k))
    np.savez(buffer, allow_pickle=False, key=key, bounds=bounds, **arrays)
    run_dir.eval_targets_path.mkdir(exist_ok=True)
    write_whole(run_dir.eval_targets_path / "answers.npz", buffer.getvalue())


def _key(examples: Sequence[Example], top_k: int) -> str:
    """What the stored answers belong to."""
    digest = hashlib.sha256(f"{top_k}".encode())
    for example in examples:
        token_ids, start = example.asked
        digest.update(f" {start} {len(token_ids)} ".encode())
        digest.update(np.ascontiguousarray(token_ids, "<i4").tobytes())
    return digest.hexdigest()
