"""A run's configuration: the same fields as the contract, every default in one place, every problem at once."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from scripts.reference.contract_text import declarations
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config import schema, teacher
from stillhouse.student_trainer.config.fields import Choices, DefaultText, Range, Required, fields_of
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.config.schema import RunConfig
from tests.student_trainer.config.specs import ALM, SMALLEST, changed, spec_of, violations

OWN_DRAWS = {"sparse_target": "student_tail", "terms": [{"divergence": "reverse_kl"}]}
PYTHON_TYPES = {
    FieldDescriptor.CPPTYPE_INT32: int,
    FieldDescriptor.CPPTYPE_INT64: int,
    FieldDescriptor.CPPTYPE_DOUBLE: float,
    FieldDescriptor.CPPTYPE_BOOL: bool,
    FieldDescriptor.CPPTYPE_STRING: str,
}


def compare(cls: type[Any], message: Descriptor) -> dict[type[Any], str]:
    """Assert that `cls` has the fields of `message`, in order and in kind; name of the message by class."""
    assert list(fields_of(cls)) == [field.name for field in message.fields], cls.__name__
    compared = {cls: message.name}
    for name, info in fields_of(cls).items():
        descriptor: Any = message.fields_by_name[name]
        if info.mapping:
            assert descriptor.message_type.GetOptions().map_entry
        elif info.nested is not None:
            compared |= compare(info.nested, descriptor.message_type)
        else:
            assert PYTHON_TYPES[descriptor.cpp_type] is info.python_type, f"{cls.__name__}.{name}"
    return compared


def test_config_has_the_fields_of_the_contract() -> None:
    compared = compare(RunConfig, RunSpec.DESCRIPTOR)
    declared = {
        each
        for each in (*vars(schema).values(), *vars(teacher).values())
        if dataclasses.is_dataclass(each) and each.__module__.startswith("stillhouse.student_trainer.config.")
        if not each.__module__.endswith(".fields")
    }
    assert set(compared) == declared


def test_every_number_has_a_range() -> None:
    numbers = [
        (f"{cls.__name__}.{info.name}", info.rule(Range))
        for cls in compare(RunConfig, RunSpec.DESCRIPTOR)
        for info in fields_of(cls).values()
        if info.python_type in (int, float)
    ]
    assert [name for name, rule in numbers if rule is None] == []


def test_every_default_keeps_the_rules_of_its_field() -> None:
    for cls in compare(RunConfig, RunSpec.DESCRIPTOR):
        for info in fields_of(cls).values():
            words, span = info.rule(Choices), info.rule(Range)
            if isinstance(info.default, str) and words and not info.rule(Required):
                assert info.default in words, info
            if isinstance(info.default, int | float) and span:
                assert span.holds(info.default), info


def test_ranges_choices_and_defaults_are_written_in_the_schema_alone() -> None:
    """The contract's comments tell meanings; a choice with a meaning of its own is quoted there, and then every one is."""
    comments = {each.path: each.comment for each in declarations()}
    for cls, message in compare(RunConfig, RunSpec.DESCRIPTOR).items():
        for name, info in fields_of(cls).items():
            path = f"{message}.{name}"
            comment = comments[path]
            assert not re.search(r"in [\[(]-?[\d.]|[<>]=? ?\d|at least \d|above \d", comment), path
            is_plain = info.default not in (None, "", (), dataclasses.MISSING)
            if is_plain or info.rule(DefaultText) is not None:
                assert "nset means" not in comment, path
            words = info.rule(Choices) or ()
            quoted = re.findall(r'"([a-z_0-9]+)":', comment)
            assert quoted in ([], list(words)), path
            assert not re.search(r'"\w+"(,| or) "\w+"', comment) or not words, path


def test_defaults_are_those_of_the_documentation() -> None:
    run = from_proto(spec_of(SMALLEST))
    assert run.loss == schema.LossConfig()
    assert (run.loss.terms[0].divergence, run.loss.top_k, run.loss.temperature_mode) == (
        "forward_kl",
        None,
        "exact",
    )
    assert (run.optimizer.name, run.optimizer.learning_rate, run.optimizer.seed) == ("adamw", 1e-5, 0)
    assert (run.data.max_sequence_tokens, run.data.eval_fraction, run.data.completion_only) == (
        2048,
        0.02,
        True,
    )
    assert (run.checkpoint.every_steps, run.checkpoint.every_seconds, run.checkpoint.keep) == (500, 1800, 2)
    assert (run.retry.max_attempts, run.retry.teacher_wait_s) == (1, 3600)
    assert run.evaluation.metrics == ("kl", "perplexity", "agreement")
    assert run.student.output == "merged"


@pytest.mark.parametrize(
    ("path", "value", "field", "expected"),
    [
        ("student.lora", {}, "optimizer.learning_rate", 1e-4),
        ("student.lora", {}, "student.output", "both"),
        ("optimizer.seed", 7, "data.seed", 7),
        ("loss.top_k", 32, "evaluation.top_k", 32),
        ("checkpoint.every_seconds", 60, "checkpoint.every_steps", None),
        ("optimizer.max_grad_norm", 0, "optimizer.max_grad_norm", 0),
        ("data.eval_fraction", 0, "data.eval_fraction", 0),
    ],
)
def test_defaults_follow_other_fields_and_zero_is_no_default(
    path: str, value: Any, field: str, expected: Any
) -> None:
    here: Any = from_proto(changed(path, value))
    for name in field.split("."):
        here = getattr(here, name)
    assert here == expected


def test_an_effective_spec_reads_as_itself() -> None:
    spec = changed("student.lora", {"target_modules": ["q_proj"], "dropout": 0.1})
    spec.labels["team"] = "a"
    spec.contexts.add().dataset.SetInParent()
    run = from_proto(spec)
    effective = to_proto(run)
    assert from_proto(effective) == run
    assert to_proto(from_proto(effective)) == effective
    assert effective.optimizer.HasField("weight_decay")
    assert effective.contexts[0].WhichOneof("source") == "dataset"


def test_all_problems_are_reported_at_once_with_the_path_of_the_file() -> None:
    spec = spec_of(
        {
            "loss": {"top_k": 512, "terms": [{"divergence": "forward-kl"}, {"weight": -1}]},
            "optimizer": {"learning_rate": 0, "lr_scheduler": "cosin"},
            "teachers": [{"targets": ["localhost"]}],
        }
    )
    found = violations(spec)
    assert set(found) == {
        *("loss.top_k", "loss.terms[0].divergence", "loss.terms[1].weight", "optimizer.learning_rate"),
        *("optimizer.lr_scheduler", "teachers[0].targets[0]", "student.model", "data.train"),
    }
    assert found["loss.top_k"] == "512 is out of range; it must be in [1, 256]."
    assert 'did you mean "forward_kl"?' in found["loss.terms[0].divergence"]
    assert 'did you mean "cosine"?' in found["optimizer.lr_scheduler"]
    far = violations(changed("optimizer.name", "zzz"))
    assert far["optimizer.name"].startswith('"zzz" is not known. Possible: "adamw"')


@pytest.mark.parametrize(
    ("path", "value", "meant"),
    [
        ("loss.terms", [{"divergence": "kl_div"}], "forward_kl"),
        ("loss.terms", [{"divergence": "KL"}], "forward_kl"),
        ("evaluation.metrics", ["ppl"], "perplexity"),
        ("optimizer.precision", "bfloat16", "bf16"),
        ("optimizer.name", "adamw_torch", "adamw"),
        ("student.quantization", "bitsandbytes_4bit", "nf4"),
        ("student.quantization", "int4", "nf4"),
        ("optimizer.name", "adamax", None),
        ("student.quantization", "fp8", None),
    ],
)
def test_a_value_of_another_trainer_leads_to_the_one_that_means_the_same(
    path: str, value: Any, meant: str | None
) -> None:
    (found,) = [each for field, each in violations(changed(path, value)).items() if field.startswith(path)]
    assert (f'did you mean "{meant}"?' in found) if meant else "did you mean" not in found


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("task", "evaluation", "task"),
        ("cache", {"mode": "read"}, "cache.path"),
        ("cache", {"path": "caches/x", "mode": "none"}, "cache.mode"),
        ("task", "cache", "cache"),
        ("student.lora.layers", [-1], "student.lora.layers[0]"),
        ("student.keep_layers", [2, 0], "student.keep_layers"),
        ("student", {"model": "m", "adapter": "a", "lora": {}}, "student.lora"),
        ("student.output", "adapter", "student.output"),
        ("student.quantization", "nf4", "student.quantization"),
        ("data.train", [{"path": "a", "weight": 2}, {"path": "b"}], "data.train[1].weight"),
        ("data.eval", [{"path": "a", "weight": 2}], "data.eval[0].weight"),
        ("data.teacher_field", "category", "teachers[0].name"),
        ("data.eval_fraction", 1.0, "data.eval_fraction"),
        ("data.eval_fraction", "NaN", "data.eval_fraction"),
        ("optimizer.epochs", "Infinity", "optimizer.epochs"),
        ("optimizer.name", "adamw_4bit", "optimizer.name"),
        ("loss.terms", [{"alpha": 0.5}], "loss.terms[0].alpha"),
        ("loss.terms", [{"divergence": "jsd", "beta": 1.5}], "loss.terms[0].beta"),
        ("loss.terms", [{"divergence": "skew_kl", "alpha": 1}], "loss.terms[0].alpha"),
        (
            "loss.terms",
            [{}, {"divergence": "alpha_beta", "alpha": 0.2, "beta": 0.7}],
            "loss.terms[1].beta",
        ),
        ("loss.terms", [{"weight": 0}], "loss.hard_weight"),
        ("loss", {"sparse_target": "sampled", "terms": [{"divergence": "tvd"}]}, "loss.terms[0].divergence"),
        (
            "loss",
            {"sparse_target": "renormalise", "terms": [{"divergence": "reverse_kl"}]},
            "loss.terms[0].divergence",
        ),
        ("loss", {"sparse_target": "top_k_and_sampled", "temperature": 2}, "loss.temperature"),
        ("loss", {"sparse_target": "student_tail"}, "loss.terms[0].divergence"),
        (
            "loss",
            {"sparse_target": "student_tail", "terms": [{"divergence": "reverse_kl"}]},
            "loss.sparse_target",
        ),
        (
            "contexts",
            [{"student": {}, "loss": {**OWN_DRAWS, "temperature": 2}}],
            "contexts[0].loss.temperature",
        ),
        (
            "loss",
            {"temperature": 2, "temperature_mode": "conditional", "terms": [{"divergence": "mse"}]},
            "loss.terms[0].divergence",
        ),
        ("loss.foreign_tokenizer", "ALM", "loss.foreign_tokenizer"),
        ("loss", {**ALM, "chunk_temperature": 0}, "loss.chunk_temperature"),
        ("loss", {**ALM, "temperature": 2}, "loss.temperature"),
        ("loss", {**ALM, "sparse_target": "sampled"}, "loss.sparse_target"),
        ("loss", {**ALM, "terms": [{"divergence": "mse"}]}, "loss.terms[0].divergence"),
        (
            "loss",
            {**ALM, "terms": [{"token_weighting": "teacher_entropy"}]},
            "loss.terms[0].token_weighting",
        ),
        ("contexts", [{"dataset": {}, "loss": ALM}, {"dataset": {}}], "loss.foreign_tokenizer"),
        ("contexts", [{"student": {}, "loss": ALM}], "contexts[0]"),
        ("contexts", [{"teacher": {}, "loss": ALM}], "contexts[0]"),
        (
            "contexts",
            [{"dataset": {}, "loss": ALM}, {"dataset": {}, "loss": {**ALM, "chunks": "words"}}],
            "contexts",
        ),
        ("evaluation.metrics", ["alm"], "evaluation.metrics"),
        ("loss.temperature", 0, "loss.temperature"),
        ("contexts", [{"weight": 1}], "contexts[0]"),
        ("contexts", [{"dataset": {}, "loss": {"top_k": 999}}], "contexts[0].loss.top_k"),
        ("contexts", [{"dataset": {}}, {"teacher": {}, "loss": {"reduction": "sequence_mean"}}], "contexts"),
        ("contexts", [{"student": {"rollout_target": "a:1"}}], "contexts[0].student.rollout_target"),
        ("contexts", [{"student": {"rollout_targets": ["a"]}}], "contexts[0].student.rollout_targets[0]"),
        ("student", {"model": "m", "quantization": "nf4"}, "student.quantization"),
        ("contexts", [{"student": {}, "loss": {"hard_weight": 1}}], "contexts[0].loss.hard_weight"),
        ("contexts", [{"student": {"min_teacher_logprob": 1}}], "contexts[0].student.min_teacher_logprob"),
        (
            "loss.terms",
            [{"divergence": "reverse_kl", "estimator": "policy_gradient"}],
            "loss.terms[0].estimator",
        ),
        (
            "contexts",
            [{"student": {}, "loss": {"terms": [{"estimator": "policy_gradient"}]}}],
            "contexts[0].loss.terms[0].divergence",
        ),
        ("evaluation.metrics", ["kl", "meteor"], "evaluation.metrics[1]"),
        ("evaluation.best_metric", "bleu", "evaluation.best_metric"),
        ("evaluation.match", "choices", "evaluation.match"),
        ("evaluation.sets", [{"name": "a b", "path": "x"}], "evaluation.sets[0].name"),
        ("evaluation.sets", [{"name": "..", "path": "x"}], "evaluation.sets[0].name"),
        ("data.train", [{"path": "x", "columns": {"promt": "question"}}], "data.train[0].columns"),
        ("data.eval", [{"path": "x", "columns": {"Completion": "a"}}], "data.eval[0].columns"),
        (
            "evaluation.sets",
            [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}],
            "evaluation.sets[1].name",
        ),
        (
            "evaluation.sets",
            [{"name": "a", "path": "x", "match": "choices", "metrics": ["bleu"]}],
            "evaluation.sets[0].metrics",
        ),
        ("evaluation.generation", {"samples_per_prompt": 2}, "evaluation.generation.samples_per_prompt"),
        ("resources.num_processes", 65, "resources.num_processes"),
        ("resources", {"gpus": [0, 1], "num_processes": 3}, "resources.num_processes"),
        ("resources", {"gpu_count": 65}, "resources.gpu_count"),
        ("resources.gpus", [0, 0], "resources.gpus"),
        ("teachers.0.targets", [], "teachers[0].targets"),
        ("teachers.0.targets", ["host:99999"], "teachers[0].targets[0]"),
        ("teachers.0.prefetch_steps", 65, "teachers[0].prefetch_steps"),
        ("teachers", [], "teachers"),
        ("teachers", [{"targets": ["a:1"]}, {"targets": ["b:1"]}], "teachers[1].name"),
        (
            "teachers",
            [{"targets": ["a:1"], "name": "x"}, {"targets": ["b:1"], "name": "x"}],
            "teachers[1].name",
        ),
        ("display_name", "a\u001b[2Jb", "display_name"),
        ("display_name", "x" * 201, "display_name"),
        ("student.model", "a\0b", "student.model"),
    ],
)
def test_a_spec_that_cannot_run_is_refused_by_name(path: str, value: Any, field: str) -> None:
    assert field in violations(changed(path, value))


def test_parameters_of_divergences_have_defaults_in_the_effective_spec() -> None:
    terms = [{"divergence": "skew_kl"}, {"divergence": "alpha_beta", "alpha": 0.2, "beta": 0.8}]
    run = from_proto(changed("loss.terms", terms))
    written = to_proto(run).loss.terms
    assert [(each.alpha, each.beta) for each in written] == [(0.1, 0), (0.2, 0.8)]
    assert not written[0].HasField("beta")
    assert from_proto(to_proto(run)) == run


def test_rows_and_tokens_of_a_pass_are_given_in_one_way() -> None:
    def optimizer(**values: int) -> schema.OptimizerConfig:
        return from_proto(spec_of({**SMALLEST, "optimizer": values})).optimizer

    plain = optimizer()
    assert (plain.batch_size, plain.micro_batch_size, plain.rows_per_update, plain.cuts_by_rows) == (
        8,
        None,
        8,
        False,
    )
    older = optimizer(micro_batch_size=4, grad_accum_steps=3)
    assert (older.rows_per_update, older.rows_per_pass, older.batch_size, older.cuts_by_rows) == (
        12,
        4,
        None,
        True,
    )
    assert optimizer(grad_accum_steps=3).rows_per_update == 24
    assert optimizer(micro_batch_size=3).rows_per_update == 3
    for name in ("batch_size", "micro_batch_tokens"):
        with pytest.raises(
            StillhouseError, match=rf"optimizer\.{name}: is set beside micro_batch_size .* 16 is the update"
        ):
            optimizer(**{name: 64, "grad_accum_steps": 2})


@pytest.mark.parametrize("name", ["batch_size", "micro_batch_size", "grad_accum_steps"])
def test_no_rows_and_more_rows_than_a_process_holds_are_refused(name: str) -> None:
    for value in (0, 10**9):
        with pytest.raises(StillhouseError, match=rf"optimizer\..*{value}.* must be (at least 1|.*65,?536)"):
            from_proto(spec_of({**SMALLEST, "optimizer": {name: value}}))
