"""The defaults of a run that depend on its other fields; plain ones stand beside their fields in schema.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.resources import CHECKPOINT_EVERY_SECONDS, CHECKPOINT_EVERY_STEPS
from stillhouse.student_trainer.config.rules.cross_tokenizer import is_bridged
from stillhouse.student_trainer.config.schema import (
    BUCKET_TOP_K,
    LORA_LEARNING_RATE,
    MAX_TOP_K,
    EvaluationConfig,
    LossConfig,
    RunConfig,
)
from stillhouse.student_trainer.config.settled.target_choice import settle_by_file


def fill_defaults(config: RunConfig, spec: RunSpec) -> RunConfig:
    """`config` with the defaults that depend on other fields."""
    optimizer, data = config.optimizer, config.data
    checkpoint = config.checkpoint
    if config.student.trains_adapter and not spec.optimizer.HasField("learning_rate"):
        optimizer = replace(optimizer, learning_rate=LORA_LEARNING_RATE)
    if optimizer.cuts_by_rows:
        # batch_size stays as it is, so that the checks see both ways side by side.
        optimizer = replace(
            optimizer,
            micro_batch_size=optimizer.rows_per_pass,
            grad_accum_steps=1 if optimizer.grad_accum_steps is None else optimizer.grad_accum_steps,
        )
    else:
        optimizer = replace(optimizer, batch_size=optimizer.rows_per_update)
    if not spec.data.HasField("seed"):
        data = replace(data, seed=optimizer.seed)
    if data.packing is None and (optimizer.cuts_by_rows or config.classifies):
        data = replace(data, packing=False)
    if checkpoint.every_steps is checkpoint.every_epochs is checkpoint.every_seconds is None:
        checkpoint = replace(
            checkpoint, every_steps=CHECKPOINT_EVERY_STEPS, every_seconds=CHECKPOINT_EVERY_SECONDS
        )
    student = config.student
    if student.trains_adapter and not spec.student.HasField("output"):
        student = replace(student, output="both")
    contexts = tuple(
        replace(context, loss=settle_by_file(config, _with_parameters(context.loss)))
        if context.loss
        else context
        for context in config.contexts
    )
    loss = settle_by_file(config, _with_parameters(config.loss))
    if config.task == "evaluate":  # nothing is trained: whatever loss the file has for that is left out
        loss, contexts = LossConfig(terms=(), sparse_target="tail_bucket"), RunConfig().contexts
    return replace(
        config,
        student=student,
        optimizer=optimizer,
        data=data,
        contexts=contexts,
        loss=loss,
        checkpoint=checkpoint,
        evaluation=_evaluation(config, spec),
    )


def _evaluation(config: RunConfig, spec: RunSpec) -> EvaluationConfig:
    evaluation = config.evaluation
    if not spec.evaluation.HasField("top_k"):
        # Within its range, so that a loss.top_k outside of it is reported once.
        top_k = BUCKET_TOP_K if config.loss.top_k is None else config.loss.top_k
        evaluation = replace(evaluation, top_k=max(1, min(top_k, MAX_TOP_K)))
    if evaluation.generation is not None and not spec.evaluation.generation.HasField("samples_per_prompt"):
        evaluation = replace(evaluation, generation=replace(evaluation.generation, samples_per_prompt=1))
    if not evaluation.metrics and evaluation.teacher_alone:
        evaluation = replace(evaluation, metrics=("perplexity",))
    if not evaluation.metrics:
        evaluation = replace(evaluation, metrics=_metrics(config))
    if config.classifies and not spec.evaluation.HasField("examples"):
        evaluation = replace(evaluation, examples=0)
    return evaluation


def _metrics(config: RunConfig) -> tuple[str, ...]:
    """The metrics of an evaluation that names none."""
    if config.classifies:
        return ("accuracy", "f1", "ece", *(("kl", "agreement") if config.has_teacher else ()))
    if not config.has_teacher:
        return ("perplexity",)
    return ("alm", "perplexity") if is_bridged(config) else ("kl", "perplexity", "agreement")


def _with_parameters(loss: LossConfig) -> LossConfig:
    terms = []
    for term in loss.terms:
        values: dict[str, Any] = dict(term.parameters)
        terms.append(replace(term, **values))
    return replace(loss, terms=tuple(terms))
