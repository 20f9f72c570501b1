"""`--set`: typed by the field, checked as a file is."""

from __future__ import annotations

import pytest

from stillhouse.client.runfile.load import parse_run
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec

FILE = b"""\
student: {model: x}
teachers:
  - targets: [a:1]
contexts:
  - dataset: {}
loss:
  terms:
    - weight: 1
"""


def with_overrides(*overrides: str) -> RunSpec:
    return parse_run(FILE, "run.yaml", overrides).spec


def problem(*overrides: str) -> str:
    with pytest.raises(StillhouseError) as caught:
        with_overrides(*overrides)
    return str(caught.value)


def test_values_take_the_type_of_their_field() -> None:
    spec = with_overrides(
        "student.model=2024",
        "displayName=no: really",
        "loss.terms.0.weight=2",
        "loss.terms[1].divergence=mse",
        "teachers.0.targets.1=b:1",
        "teachers[0].targets[0]=c:1",
        "student.lora={rank: 8}",
        "optimizer.learning_rate=1e-4",
        "data.packing=true",
        "data.train=[{path: r.jsonl}]",
        "evaluation.metrics=[kl]",
        "labels.a.b=1=2",
        "contexts.0.student={maxStaleness: 2}",
    )
    assert spec.student.model == "2024"
    assert spec.display_name == "no: really"
    assert [(term.weight, term.divergence) for term in spec.loss.terms] == [(2, ""), (0, "mse")]
    assert list(spec.teachers[0].targets) == ["c:1", "b:1"]
    assert spec.student.lora.rank == 8
    assert spec.optimizer.learning_rate == 1e-4
    assert spec.data.packing
    assert [each.path for each in spec.data.train] == ["r.jsonl"]
    assert list(spec.evaluation.metrics) == ["kl"]
    assert dict(spec.labels) == {"a.b": "1=2"}
    assert spec.contexts[0].WhichOneof("source") == "student"
    assert spec.contexts[0].student.max_staleness == 2


def test_a_number_that_the_run_finds_may_be_given_as_auto() -> None:
    spec = with_overrides("optimizer={micro_batch_tokens: auto, batch_size: 32}")
    assert not spec.optimizer.HasField("micro_batch_tokens")
    assert spec.optimizer.batch_size == 32
    spec = with_overrides("optimizer.micro_batch_tokens=512", "optimizer.micro_batch_tokens=auto")
    assert not spec.optimizer.HasField("micro_batch_tokens")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("foo", "expects path=value, such as loss.top_k=32 or loss.terms[0].weight=2."),
        ("=3", "expects path=value, such as loss.top_k=32 or loss.terms[0].weight=2."),
        ("loss..top_k=3", "expects path=value, such as loss.top_k=32 or loss.terms[0].weight=2."),
        ("loss.topk=3", 'loss.topk: there is no such field; did you mean "top_k"?'),
        ("loss.top_k=abc", 'loss.top_k: expects a whole number; "abc" is text.'),
        ("loss.top_k=true", "loss.top_k: expects a whole number; true is a boolean."),
        ("loss.terms.7.weight=2", "loss.terms: has 1 items; index 7 is beyond its end."),
        ("loss.terms.weight=2", 'loss.terms: is a list; write an index before "weight", such as loss.terms[0].'),
        ("student.lora=", 'student.lora: expects a list or a set of fields, such as [a, b] or {a: 1}; "" is none.'),
        ("student.lora=null", "student.lora: is empty; write `lora: {}` for its defaults, or remove it."),
        ("student.lora={rnk: 1}", 'student.lora.rnk: there is no such field; did you mean "rank"?'),
        ("optimizer.seed.x=2", 'optimizer.seed: is one value and has no "x" below it.'),
        ("teachers.0.targets.0.x=2", 'teachers[0].targets[0]: is one value and has no "x" below it.'),
        ("loss.terms.0=5", 'loss.terms[0]: expects fields, each as `name: value`; 5 is a number.'),
    ],
)  # fmt: skip
def test_a_bad_override_gets_one_sentence(override: str, sentence: str) -> None:
    assert problem(override) == f"--set {override}: {sentence}"


def test_problems_of_file_and_overrides_come_together() -> None:
    with pytest.raises(StillhouseError) as caught:
        parse_run(b"studnet: {}", "run.yaml", ["loss.top_k=x", "loss.topk=1"])
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "run.yaml:1:1",
        "--set loss.top_k=x",
        "--set loss.topk=1",
    ]
