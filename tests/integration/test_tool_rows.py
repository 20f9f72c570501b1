"""Conversations with tools, from OpenAI's batch file over a teacher's completions to a student that has learnt from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.client.api import BatchSettings, Sampling, Teacher, Trainer, generate_file
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.conftest import Models
from tests.protos.rows.chat_templates import TOOLS
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher
from tests.support.runs import Service, completed, small_spec

TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}
MESSAGES = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "rain", "arguments": '{"in": "Köln"}'}}
        ],
    },
    {"role": "tool", "content": "wet", "tool_call_id": "1"},
]


def with_tools(model: Path, directory: Path) -> Path:
    shutil.copytree(model, directory)
    (directory / "chat_template.jinja").write_text(TOOLS)
    return directory


@pytest.fixture
def teacher(models: Models, tmp_path: Path) -> Iterator[Program]:
    with (
        no_process_left() as mark,
        start_teacher(
            with_tools(models.teacher, tmp_path / "teacher"),
            engine="hf",
            directory=tmp_path,
            options=["--dtype", "float32", "--threads", "1"],
            environment=mark,
        ) as program,
    ):
        yield program


@pytest.mark.slow
def test_a_student_learns_from_tool_conversations(
    teacher: Program, service: Service, trainer: Trainer, models: Models, tmp_path: Path
) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "tools": [TOOL], "max_tokens": 8, "n": 8, "seed": 1}
    source, data = tmp_path / "in.jsonl", tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"custom_id": "1", "url": "/v1/chat/completions", "body": body}) + "\n")
    with Teacher(teacher.target) as client:
        summary = generate_file(client, source, data, BatchSettings(as_dataset=True, sampling=Sampling()))
    assert (summary.rows, summary.failed) == (1, 0)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["tools"] == [TOOL] and row["messages"][0]["role"] == "system" for row in rows)

    pushed = Path(trainer.push_dataset(data).name)
    student = with_tools(models.student, tmp_path / "student")
    longer = {"data": {"max_sequence_tokens": 400}}
    asked: dict[str, Any] = {"train": pushed, "teacher": teacher.target, "steps": 2, "changes": longer}
    completed(trainer.create_run(small_spec(student=student, **asked)), service)

    plain = trainer.create_run(small_spec(student=models.student, **asked)).wait()
    assert plain.state == Run.STATE_FAILED
    assert "field tools: leaves no trace in the text" in plain.error.message
