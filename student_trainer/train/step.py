"""One optimizer step: forward and backward of its micro-batches, then an update, unless a value is non-finite."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import structlog
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stillhouse.student_trainer.config.schema import LossConfig, RunConfig
from stillhouse.student_trainer.train.batching.baselines import Baseline, batch_sums, with_baselines
from stillhouse.student_trainer.train.batching.collate import (
    Factor,
    MicroBatch,
    ScoredExample,
    chunk_sums,
    collate,
    total_weight,
)
from stillhouse.student_trainer.train.batching.passes import Pass
from stillhouse.student_trainer.train.batching.target_forms import TargetForm, TokenWeighting
from stillhouse.student_trainer.train.checkpointing.checkpoint import Progress
from stillhouse.student_trainer.train.contexts.source import StepData
from stillhouse.student_trainer.train.distributed.ranks import Ranks
from stillhouse.student_trainer.train.loss.alm import chunk_objective
from stillhouse.student_trainer.train.loss.divergences import DIVERGENCES
from stillhouse.student_trainer.train.loss.fused import fused_objective
from stillhouse.student_trainer.train.loss.objective import ObjectiveSum, Positions, objective
from stillhouse.student_trainer.train.loss.reduction import Reduction
from stillhouse.student_trainer.train.loss.text_logprobs import text_logprobs, text_logprobs_of
from stillhouse.student_trainer.train.loss.workspace import Workspace
from stillhouse.student_trainer.train.optim import clip_gradients, learning_rate, set_learning_rate
from stillhouse.student_trainer.train.process.memory import memory_of
from stillhouse.student_trainer.train.student.hidden_term import add_hidden_mse
from stillhouse.student_trainer.train.student.lm_head import LmHead
from stillhouse.student_trainer.train.student.packing_check import cutter_of
from stillhouse.student_trainer.train.student.student import Student

log = structlog.get_logger()

CHUNK_LOGITS = 2**27
"""Logits whose float32 log-probabilities exist at a time where the loss is not fused; the backward pass recomputes them."""


_TEXT_ALONE = LossConfig(terms=(), hard_weight=1.0)
_DROPOUT_STREAM = 6
"""Separates these random numbers from those of orders, contexts and texts."""


class Stepper:
    """Takes optimizer steps; the optimizer is its only state of the run."""

    def __init__(
        self,
        student: Student,
        optimizer: torch.optim.Optimizer,
        accelerator: Any,
        config: RunConfig,
        *,
        total_steps: int,
        vocab_size: int,
        ranks: Ranks | None = None,
    ) -> None:
        """`vocab_size` is the effective vocabulary: the ids that student and teacher both know.

        Of several `ranks`, each computes the gradient of its own sequences; the update is that of all.
        """
        self._student = student
        self._ranks = ranks or Ranks()
        self._optimizer = optimizer
        self._prepared = accelerator.prepare_optimizer(optimizer)
        self._accelerator = accelerator
        self._config = config
        self._total_steps = total_steps
        self._vocab_size = vocab_size
        self._losses = [context.loss or config.loss for context in config.contexts]
        # The configuration's checks see to it that all contexts reduce alike.
        self._reduction = cast("Reduction", self._losses[0].reduction)
        named = {term.token_weighting for loss in self._losses for term in loss.terms if term.weight > 0}
        self._weightings = [
            Factor(weighting=cast("TokenWeighting", name), vocab_size=vocab_size)
            for name in sorted(named - {"uniform"})
        ]
        self._baselines = {
            number: cast("Baseline", term.baseline)
            for number, loss in enumerate(self._losses)
            for term in loss.terms
            if term.weight > 0 and term.baseline != "none"
        }
        self.device: torch.device = accelerator.device
        """Device of the student."""
        self.parameters = list(student.trainable_parameters().values())
        """The trained weights."""
        self.head = LmHead(student)
        """The student's output layer."""
        self._workspace = Workspace()
        self._in_pass: Sequence[ScoredExample] = ()
        """Sequences of the current pass, for the error of one that runs out of memory."""
        self._packed = False
        self._matmul_dtype: torch.dtype | None = None
        if self.head.layer is None and student.is_language_model:
            log.info("loss and output layer are not fused", why="the layer is not a plain linear one")
        self.cutter = cutter_of(config, student, accelerator.device)
        """Cuts a step, and evaluations, into passes."""

    def multiply_in(self, matmul_dtype: str | None) -> None:
        """Sets the matmul dtype of the fused loss; None is that of autocast or weights."""
        self._matmul_dtype = getattr(torch, matmul_dtype) if matmul_dtype else None
        log.info("matmuls of the loss", dtype=matmul_dtype or "by precision")

    @property
    def has_optimizer_state(self) -> bool:
        """True once an update has made the optimizer's states, or a checkpoint has brought them."""
        return bool(self._optimizer.state)

    def weights(self) -> Iterator[Tensor]:
        """All weights and buffers of the student."""
        yield from self._student.model.parameters()
        yield from self._student.projections.parameters()
        yield from self._student.model.buffers()

    def cut(self, scored: Sequence[ScoredExample]) -> list[Pass]:
        """Cuts rows into passes, each of one context."""
        lengths = [len(each.example.token_ids) for each in scored]
        return self.cutter.cut(lengths, [each.context for each in scored])

    def take_step(self, data: StepData, progress: Progress) -> dict[str, float]:
        """Takes a step and moves `progress` on; the metrics over all processes.

        A non-finite loss or gradient changes no weight and is counted in `progress`.
        """
        began = time.monotonic()
        self._seed_dropout(data.step)
        passes = self.cut(data.scored)
        whole = self._sum_step(data.scored, passes)
        sums = {number: (whole[f"{number}/total"], whole[f"{number}/count"]) for number in self._baselines}
        scored = with_baselines(data.scored, self._baselines, sums)
        num_tokens = int(whole["tokens"])
        rate = learning_rate(data.step, self._total_steps, self._config.optimizer)
        set_learning_rate(self._optimizer, rate)
        metrics = {"train/learning_rate": rate, "train/teacher_wait_s": data.teacher_wait_s}
        if num_tokens:
            metrics["train/padding"] = whole["computed"] / whole["needed"]
            factors = [
                plain.scaled(whole[f"{plain.weighting}/total"], whole[f"{plain.weighting}/denominator"])
                for plain in self._weightings
            ]
            chunk_scale = whole["chunks/targets"] / (whole["chunks/weight"] or 1.0)
            with memory_of(lambda: self._describe_work(data.step + 1)):
                means = self._accumulate(scored, passes, whole["weight"], factors, chunk_scale)
                norm = self._update(means["loss"])
            metrics |= {f"train/{name}": value for name, value in means.items()} | {"train/grad_norm": norm}
            updated = math.isfinite(means["loss"]) and (
                math.isfinite(norm) or self._accelerator.scaler is not None
            )
            if updated:
                progress.trained_tokens += num_tokens
                progress.skipped_in_a_row = 0
            else:
                progress.skipped_steps += 1
                progress.skipped_in_a_row += 1
                log.warning("step without an update", step=data.step + 1, loss=means["loss"], grad_norm=norm)
        progress.step = data.step + 1
        step_time_s = time.monotonic() - began + data.teacher_wait_s
        return metrics | {
            "train/trained_tokens": float(progress.trained_tokens),
            "train/tokens_per_second": num_tokens / max(step_time_s, 1e-9),
            "train/step_time_s": step_time_s,
        }

    def _describe_work(self, step: int) -> str:
        """The current pass with its size, or the update after the last one: a subject of a sentence."""
        if not self._in_pass:
            return f"The update of step {step}"
        lengths = [len(each.example.token_ids) for each in self._in_pass]
        rows = f"{len(lengths)} {'row' if len(lengths) == 1 else 'rows'}"
        size = f"{sum(lengths)} tokens, packed"
        if not self._packed:
            size = f"{len(lengths) * max(lengths)} tokens with padding, the longest row {max(lengths)}"
        return f"A forward and backward pass of step {step} ({rows}, {size})"

    def _seed_dropout(self, step: int) -> None:
        """Makes the random numbers of several processes a function of seed, step and rank, which no checkpoint holds."""
        if self._ranks.size > 1:
            seeds = np.random.SeedSequence(
                [self._config.optimizer.seed, _DROPOUT_STREAM, step, self._ranks.rank]
            )
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def _sum_step(self, scored: Sequence[ScoredExample], passes: Sequence[Pass]) -> dict[str, float]:
        """Sums over the step in all processes.

        "tokens", "weight" (its denominator), "needed" and "computed" (tokens without and with padding), and those of
        weightings and baselines.
        """
        examples = [each.example for each in scored]
        lengths = [len(each.token_ids) for each in examples]
        own = {
            "needed": float(sum(lengths)),
            "computed": float(sum(each.computed_tokens(lengths) for each in passes)),
            "tokens": float(sum(each.num_targets for each in examples)),
            "weight": total_weight(examples, self._reduction),
        }
        own["chunks/targets"], own["chunks/weight"] = chunk_sums(scored, self._reduction)
        for plain in self._weightings:
            total, denominator = plain.sums(scored, self._reduction)
            own |= {f"{plain.weighting}/total": total, f"{plain.weighting}/denominator": denominator}
        for number in self._baselines:
            total, count = batch_sums(scored, number)
            own |= {f"{number}/total": total, f"{number}/count": count}
        return self._ranks.sum(own)

    def _accumulate(
        self,
        scored: Sequence[ScoredExample],
        passes: Sequence[Pass],
        denominator: float,
        factors: Sequence[Factor],
        chunk_scale: float,
    ) -> dict[str, float]:
        """Adds up the gradients of a step; means of the objective and its parts. Ends at a non-finite loss."""
        sums: Counter[str] = Counter()
        shares: Counter[str] = Counter()
        for each in passes:
            group = [scored[row] for row in each.rows]
            self._in_pass, self._packed = group, each.packed
            loss = self._losses[group[0].context]
            batch = self._collate(group, factors, chunk_scale, packed=each.packed)
            summed = self._objective(batch, loss, upstream=1 / denominator)
            weight = batch.positions.weights.sum().item() / denominator
            for name, value in {"loss": summed.loss_sum.detach(), **summed.parts}.items():
                sums[name] += value.item() / _gradient_scale(name, loss) / denominator  # type: ignore[assignment]  # a Counter of floats
                shares[name] += 1.0 if name == "loss" else weight  # type: ignore[assignment]
            if not math.isfinite(sums["loss"]):
                break
            self._accelerator.backward(summed.loss_sum * (1 / denominator))
        self._in_pass = ()
        return self._means(sums, shares)

    def _collate(
        self, group: Sequence[ScoredExample], factors: Sequence[Factor], chunk_scale: float, *, packed: bool
    ) -> MicroBatch:
        context = group[0].context
        loss, student = self._losses[context], self._config.contexts[context].student
        return collate(
            group,
            reduction=self._reduction,
            device=self.device,
            max_importance_weight=student.max_importance_weight if student else math.inf,
            form=cast("TargetForm", loss.sparse_target),
            temperature=loss.temperature,
            factors=factors,
            packing=packed,
            chunk_scale=chunk_scale,
        )

    def rehearse(self, group: Sequence[ScoredExample]) -> None:
        """Computes a padded pass and its gradients, and drops them; a loss that lacks its targets is cross-entropy."""
        loss = self._losses[group[0].context]
        try:
            batch = self._collate(group, self._weightings, 1.0, packed=False)
            lacks = (
                batch.chunks is None and batch.positions.targets is None and batch.positions.sampled is None
            )
            summed = self._objective(batch, _TEXT_ALONE if lacks else loss)
            self._accelerator.backward(summed.loss_sum / max(1, batch.num_targets))
        finally:
            self._prepared.zero_grad()

    def _means(self, sums: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
        """Means over all processes; each part over the tokens of the contexts that have it."""
        if self._ranks.size > 1:
            # The sum of all processes' shares of a loss is 1.
            both = self._ranks.exchange([dict(sums), {**shares, "loss": 0.0}])
            sums, shares = Counter(), Counter({"loss": 1.0})
            for own_sums, own_shares in both:
                sums.update(own_sums)
                shares.update(own_shares)
        if len(self._losses) == 1:
            return {name: float(value) for name, value in sums.items()}
        return {
            name: float(value) if name == "loss" else float(value) / shares[name]
            for name, value in sums.items()
        }

    def _update(self, loss: float) -> float:
        """Changes the weights if it can; the norm of the gradient before clipping, 0 where there is none."""
        norm = math.nan
        if math.isfinite(loss):
            self._ranks.sum_gradients(self.parameters)
            self._accelerator.unscale_gradients()
            norm = clip_gradients(self.parameters, self._config.optimizer.max_grad_norm)
            # With fp16 an infinite gradient is part of finding the scale: the scaler skips the step.
            if math.isfinite(norm) or self._accelerator.scaler is not None:
                self._prepared.step()
        self._prepared.zero_grad()
        return norm

    def _objective(self, batch: MicroBatch, loss: LossConfig, *, upstream: float = 1.0) -> ObjectiveSum:
        """The objective of a micro-batch; fused with the output layer if that is plain. `upstream` as in `fused_objective`."""
        layer = self.head.layer
        compares = loss.compares_hidden and batch.states is not None
        if batch.chunks is not None:
            return chunk_objective(self._text_logprobs(batch), batch.positions.weights, batch.chunks, loss)
        with self._accelerator.autocast():
            if layer is not None:
                hidden, states = (
                    self.head.hidden_and_states(batch) if compares else (self.head.hidden(batch), ())
                )
                summed = fused_objective(
                    hidden,
                    layer,
                    batch.positions,
                    loss,
                    vocab_size=self._vocab_size,
                    workspace=self._workspace,
                    matmul_dtype=self._matmul_dtype,
                    upstream=upstream,
                )
                return add_hidden_mse(summed, self._student, states, batch, loss=loss, hidden=hidden)
            logits, states = (
                self._student.logits_and_states(batch) if compares else (self._student.logits(batch), ())
            )
        summed = self._chunked(logits, batch.positions, loss)
        return add_hidden_mse(summed, self._student, states, batch, loss=loss)

    def _text_logprobs(self, batch: MicroBatch) -> Tensor:
        """[1, N]: log-probabilities of the targets, with gradients."""
        layer = self.head.layer
        with self._accelerator.autocast():
            if layer is not None:
                return text_logprobs(self.head.hidden(batch), layer, batch.positions.target_ids)
            logits = self._student.logits(batch)
        return text_logprobs_of(logits, batch.positions.target_ids, chunk_logits=CHUNK_LOGITS)

    def _chunked(self, logits: Tensor, positions: Positions, loss: LossConfig) -> ObjectiveSum:
        """The objective of a model's whole logits, a chunk of targets at a time."""
        num_targets = logits.shape[1]
        chunk_targets = max(1, CHUNK_LOGITS // logits.shape[-1])
        if num_targets <= chunk_targets:
            return self._chunk(logits, positions, slice(None), loss)
        parts = [
            cast(
                "ObjectiveSum",
                checkpoint(
                    self._chunk,
                    logits,
                    positions,
                    slice(first, first + chunk_targets),
                    loss,
                    use_reentrant=False,
                    preserve_rng_state=False,
                ),
            )
            for first in range(0, num_targets, chunk_targets)
        ]
        return ObjectiveSum.total(parts)

    def _chunk(self, logits: Tensor, positions: Positions, rows: slice, loss: LossConfig) -> ObjectiveSum:
        here = positions.rows(rows)
        return objective(
            logits[:, rows],
            here.target_ids,
            here.targets,
            here.weights,
            loss,
            vocab_size=self._vocab_size,
            sampled=here.sampled,
            token_factors=here.token_factors,
        )


def _gradient_scale(name: str, loss: LossConfig) -> float:
    """The factor T² of a divergence at a temperature, which keeps gradients and is no part of its metric.

    In mode conditional only one of two summands has it: that metric is the objective's.
    """
    return loss.temperature**2 if name in DIVERGENCES and loss.temperature_mode == "exact" else 1.0
