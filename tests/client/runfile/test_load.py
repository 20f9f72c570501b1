"""A run file's problems: all at once, where the user wrote them, in the user's own spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.client.runfile.load import MAX_RUN_FILE_BYTES, RunFile, load_run_file, parse_fields, parse_run
from stillhouse.protos.errors import FieldViolation, Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec


def read(text: str, *overrides: str, source: str = "run.yaml") -> RunFile:
    return parse_run(text.encode(), source, overrides)


def problems(text: str, *overrides: str, source: str = "run.yaml") -> list[str]:
    with pytest.raises(StillhouseError) as caught:
        read(text, *overrides, source=source)
    assert caught.value.reason is Reason.INVALID_SPEC
    return str(caught.value).splitlines()


def test_both_spellings_and_every_kind_of_value_are_read() -> None:
    spec = read(
        """
        displayName: a name
        student: {model: org/student, lora: {}}
        teachers:
          - targets: [host:7401, "other:7401"]
        data:
          train:
            - path: rows.jsonl
              limit: 1_000
          eval_fraction: .5
          completionOnly: false
        optimizer:
          learning_rate: 1e-4
          max_steps: "12"
          max_grad_norm: 1
        resources: {gpus: [0, 1]}
        labels: {team: blue, answer: no}
        """
    ).spec
    expected = RunSpec(display_name="a name", labels={"team": "blue", "answer": "no"})
    expected.student.model = "org/student"
    expected.student.lora.SetInParent()
    expected.teachers.add(targets=["host:7401", "other:7401"])
    expected.data.train.add(path="rows.jsonl", limit=1000)
    expected.data.eval_fraction = 0.5
    expected.data.completion_only = False
    expected.optimizer.learning_rate = 1e-4
    expected.optimizer.max_steps = 12
    expected.optimizer.max_grad_norm = 1.0
    expected.resources.gpus.extend([0, 1])
    assert spec == expected


def test_one_value_where_several_may_stand_is_a_list_of_it() -> None:
    spec = read("teachers: [{targets: host:7401}]\nresources: {gpus: 3}\n").spec
    assert list(spec.teachers[0].targets) == ["host:7401"]
    assert list(spec.resources.gpus) == [3]
    assert "expects a whole number" in "".join(problems("resources: {gpus: many}\n"))


def test_every_problem_is_reported_at_once_with_its_place() -> None:
    text = """\
display_name: 2024
student:
  modle: x
  lora:
  from_config: yes
teachers:
  targets: [a]
loss:
  top_k: true
  terms:
    - divergance: forward_kl
      weight: one
    - weight: "2"
      weight: 3
optimizer:
  learningRate: .inf
  max_steps: 1.5
  seed: 99999999999999999999
learning_rate: 3
contexts:
  - dataset: {}
    teacher: {}
labels: {a: 1}
"""
    assert problems(text) == [
        'run.yaml:1:15: display_name: expects text; 2024 is a number: write "2024" in quotes.',
        'run.yaml:3:3: student.modle: there is no such field; did you mean "model"?',
        "run.yaml:4:3: student.lora: is empty; write `lora: {}` for its defaults, or remove it.",
        'run.yaml:5:16: student.from_config: expects true or false; "yes" is text: write true.',
        'run.yaml:7:3: teachers: expects a list; this is a set of fields: put "- " before its first field.',
        "run.yaml:9:10: loss.top_k: expects a whole number; true is a boolean.",
        'run.yaml:11:7: loss.terms[0].divergance: there is no such field; did you mean "divergence"?',
        'run.yaml:12:15: loss.terms[0].weight: expects a number; "one" is text.',
        'run.yaml:13:15: loss.terms[1].weight: expects a number; "2" is text: write 2 without quotes.',
        "run.yaml:14:7: loss.terms[1].weight: is given twice, first in line 13; keep one.",
        "run.yaml:16:17: optimizer.learningRate: expects a finite number; .inf is not one.",
        "run.yaml:17:14: optimizer.max_steps: expects a whole number; 1.5 is not one.",
        "run.yaml:18:9: optimizer.seed: 99999999999999999999 is outside [-9223372036854775808, 9223372036854775807].",
        'run.yaml:19:1: learning_rate: there is no such field here; it belongs to "optimizer.learning_rate".',
        'run.yaml:22:5: contexts[0].teacher: excludes "dataset" beside it; keep one.',
        'run.yaml:23:13: labels.a: expects text; 1 is a number: write "1" in quotes.',
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "run.yaml:1:1: the file is empty; a run needs student, teachers and data."),
        ("a: [", "run.yaml:1:5: this is not valid YAML: expected the node content, but found '<stream end>'."),
        ("- a", 'run.yaml:1:1: expects fields, each as `name: value`; this is a list.'),
        ("student: base", 'run.yaml:1:10: student: expects fields, each as `name: value`; "base" is text.'),
        ("teachers: null", "run.yaml:1:11: teachers: expects a list; this is empty: write `teachers: []` or remove it."),
        ("teachers: [null]", "run.yaml:1:12: teachers[0]: is empty; give it a value or remove it."),
        ("student: {model: !!python/name:os.system x}", "run.yaml:1:18: student.model: has the tag tag:yaml.org,2002:python/name:os.system, which a run file does not know; remove it."),
        ("optimizer: {seed: 010}", "run.yaml:1:19: optimizer.seed: expects a whole number; 010 begins with 0, which some readers take for octal."),
        ("max_steps: 1\nmaxSteps: 2", 'run.yaml:1:1: max_steps: there is no such field here; it belongs to "optimizer.max_steps".'),
        ("optimizer: {max_steps: 1, maxSteps: 2}", "run.yaml:1:27: optimizer.maxSteps: is given twice, first in line 1; keep one."),
        ("loss: {top_k: 3000000000}", "run.yaml:1:15: loss.top_k: 3000000000 is outside [-2147483648, 2147483647]."),
        ("loss: {top_k: [1]}", "run.yaml:1:15: loss.top_k: expects one value; this is a list."),
        (
            "contexts: &a [{loss: {terms: [" + "{}, " * 200 + "]}}, " + "*a, " * 200 + "]",
            "run.yaml:1:1: it has more than 20,000 values, with each alias in full; such a file is a page of text.",
        ),
        ("zzz: 1", "run.yaml:1:1: zzz: there is no such field; the fields of a run are: display_name, task, student, teachers, data, contexts, cache, loss, optimizer, checkpoint, evaluation, resources, retry, labels, preset, notify, trackers."),
        ("[" * 2000, "run.yaml:1:1: the file is nested too deeply."),
    ],
)  # fmt: skip
def test_a_bad_file_gets_one_sentence(text: str, problem: str) -> None:
    assert problems(text)[0] == problem


def test_bytes_that_are_not_utf8_and_huge_files_are_refused() -> None:
    with pytest.raises(StillhouseError, match=r"^run\.yaml:2:4: this byte is not UTF-8"):
        parse_run(b"a: 1\nb: \xff", "run.yaml")
    with pytest.raises(StillhouseError, match="larger than 1048576 bytes"):
        parse_run(b" " * (MAX_RUN_FILE_BYTES + 1), "run.yaml")


def test_json_with_tabs_and_surrogate_pairs_is_read() -> None:
    text = (
        '{\n\t"displayName":\t"\\ud83d\\ude00 \\/",\n\t"optimizer": {"maxSteps": "7", "weightDecay": 1E-2}\n}'
    )
    spec = read(text, source="run.json").spec
    assert spec.display_name == "\U0001f600 /"
    assert (spec.optimizer.max_steps, spec.optimizer.weight_decay) == (7, 0.01)


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert "half of a surrogate pair" in problems('{"displayName": "\\ud83d"}', source="run.json")[0]


def test_merge_keys_yield_to_own_fields() -> None:
    spec = read("contexts:\n- loss: &base {top_k: 5, temperature: 2}\n- loss: {<<: *base, top_k: 7}\n").spec
    assert [context.loss.top_k for context in spec.contexts] == [5, 7]
    assert [context.loss.temperature for context in spec.contexts] == [2, 2]


def test_violations_of_the_service_point_into_the_file() -> None:
    file = read(
        "student:\n  model: x\ndata:\n  maxSequenceTokens: 1\nloss:\n  terms:\n    - weight: 1\n",
        "optimizer.seed=3",
    )
    error = StillhouseError(
        Reason.INVALID_SPEC,
        "bad",
        violations=[
            FieldViolation(field="optimizer.seed", description="is odd."),
            FieldViolation(field="loss.terms[0].divergence", description="is missing."),
            FieldViolation(field="data.max_sequence_tokens", description="is small."),
            FieldViolation(field="teachers", description="are missing."),
            FieldViolation(field="retry.max_attempts", description="is odd."),
        ],
    )
    assert str(file.source_map.located(error)).splitlines() == [
        "run.yaml:1:1: teachers: are missing.",
        "run.yaml:1:1: retry.maxAttempts: is odd.",
        "run.yaml:4:22: data.maxSequenceTokens: is small.",
        "run.yaml:7:7: loss.terms[0].divergence: is missing.",
        "--set optimizer.seed=3: optimizer.seed: is odd.",
    ]


def test_other_errors_are_left_alone() -> None:
    error = StillhouseError(Reason.QUOTA, "too many runs.")
    assert read("student: {model: x}").source_map.located(error) is error


def test_fields_from_python_are_checked_without_lines() -> None:
    assert parse_fields({"student": {"model": "x"}}, ["loss.top_k=3"]).spec.loss.top_k == 3
    with pytest.raises(
        StillhouseError, match=r'^student\.modle: there is no such field; did you mean "model"\?$'
    ):
        parse_fields({"student": {"modle": "x"}})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match=r"cannot read .*absent\.yaml: No such file or directory\."):
        load_run_file(tmp_path / "absent.yaml")


def test_json_settings_are_given_as_values_or_as_text(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}\n")
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    path = tmp_path / "run.yaml"
    path.write_text(
        "data:\n  chat_template: chat.jinja\n  tools: tools.json\n"
        "  chat_template_kwargs: {enable_thinking: false, effort: low}\n"
        "  train: [{path: a, columns: {prompt: question}}]\n"
    )
    data = load_run_file(path).spec.data
    assert (data.chat_template, data.tools) == ("{{ messages }}\n", '[{"name": "f"}]')
    assert data.chat_template_kwargs == '{"enable_thinking": false, "effort": "low"}'
    assert dict(data.train[0].columns) == {"prompt": "question"}
    changes = [
        "data.chat_template_kwargs={enable_thinking: true}",
        "data.tools=[]",
        "data.train[0].columns.completion=answer",
        "data.chat_template=chatml",
    ]
    data = load_run_file(path, changes).spec.data
    assert (data.chat_template, data.tools, data.chat_template_kwargs) == (
        "chatml",
        "[]",
        '{"enable_thinking": true}',
    )
    assert dict(data.train[0].columns) == {"prompt": "question", "completion": "answer"}
