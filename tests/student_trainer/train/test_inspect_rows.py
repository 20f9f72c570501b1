"""Rows as `stillhouse data inspect` shows them: the tokens and the mask are those that training has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.student_trainer.config.proto import with_defaults
from stillhouse.student_trainer.train.data.corpus import load_corpus
from stillhouse.student_trainer.train.inspect_rows import Inspector
from stillhouse.student_trainer.train.student.student import load_tokenizer
from tests.conftest import Models

ASK, ANSWER = {"role": "user", "content": "Wie viele? 🍎"}, {"role": "assistant", "content": "Drei Äpfel."}
FILES: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [ASK, ANSWER, ASK, {**ANSWER, "weight": 0}, ASK, ANSWER]},
        {"messages": [ASK, {**ANSWER, "content": "lang " * 40}], "finish_reason": "length"},
    ],
    "pairs": [{"prompt": "Ada has ", "completion": "3 apples."}, {"prompt": "b", "completion": "c " * 60}],
    "text": [{"text": "Ada has 3 apples."}],
}


def spec_of(models: Models, path: Path, **data: Any) -> pb.RunSpec:
    spec = pb.RunSpec()
    spec.student.model = str(models.student)
    spec.data.train.add(path=str(path))
    spec.data.eval_fraction = 0
    spec.data.max_sequence_tokens = 48
    for name, value in data.items():
        setattr(spec.data, name, value)
    return spec


def test_what_is_shown_is_what_is_learnt(models: Models, tmp_path: Path) -> None:
    inspector = Inspector(tmp_path)
    for name, rows in FILES.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for settings in ({}, {"chat": True}, {"completion_only": False}):
            has_weights = name == "messages" and settings.get("completion_only") is False
            if has_weights:  # a row that such a run refuses
                continue
            spec = spec_of(models, path, **settings)
            config = with_defaults(spec)
            tokenizer = load_tokenizer(config.student, tmp_path)
            trained = load_corpus(config.data, config.evaluation, tokenizer, tmp_path).train
            shown = inspector.inspect(
                pb.InspectRowsRequest(
                    spec=spec,
                    rows=[
                        pb.InspectedRow(number=number, json=json.dumps(row), in_full=True)
                        for number, row in enumerate(rows, start=1)
                    ],
                )
            )
            limit = shown.max_sequence_tokens
            assert limit == 48
            assert [list(each.token_ids[:limit]) for each in shown.rows] == [
                each.token_ids.tolist() for each in trained
            ]
            assert [list(each.targets[:limit]) for each in shown.rows] == [
                each.mask.tolist() for each in trained
            ]
            assert [each.num_targets for each in shown.rows] == [each.num_targets for each in trained]
            for each in shown.rows:
                assert not any(each.targets[limit:])
                assert b"".join(each.token_bytes).decode() == tokenizer.decode(each.token_ids)


def test_a_row_is_refused_alone(models: Models, tmp_path: Path) -> None:
    rows = ['{"messages": [{"role": "user", "content": "a"}]}', "[]", "{", '{"text": "a b"}']
    answer = Inspector(tmp_path).inspect(
        pb.InspectRowsRequest(
            spec=spec_of(models, tmp_path / "none"),
            rows=[pb.InspectedRow(number=at, json=text) for at, text in enumerate(rows, start=1)],
        )
    )
    assert [each.field for each in answer.rows] == ["messages", "(the row)", "(the row)", ""]
    assert answer.rows[0].problem.startswith('has no turn with role "assistant"')
    assert (answer.rows[3].num_tokens > 1, list(answer.rows[3].token_ids)) == (True, [])


def test_a_model_that_changes_between_two_requests_is_read_again(models: Models, tmp_path: Path) -> None:
    model, inspector = tmp_path / "model", Inspector(tmp_path)
    shutil.copytree(models.student, model)
    spec = spec_of(models, tmp_path / "none")
    spec.student.model = str(model)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    request = pb.InspectRowsRequest(spec=spec, rows=[pb.InspectedRow(json=json.dumps({"messages": turns}))])
    template = "{% for each in messages %}{{ each.content * times }}{% endfor %}"
    lengths = []
    for times in (2, 7, 7):
        (model / "chat_template.jinja").write_text(template.replace("times", str(times)))
        lengths.append(inspector.inspect(request).rows[0].num_tokens)
    assert lengths[0] < lengths[1] == lengths[2]
