"""The tokens that end turns in the data end the student's texts: in rollouts, in its exported settings, and in the log."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs
from transformers import AutoTokenizer, GenerationConfig

from stillhouse.student_trainer.config.schema import RolloutConfig, StudentConfig
from stillhouse.student_trainer.train.rollouts.local_sampler import LocalSampler
from tests.conftest import Models
from tests.student_trainer.train.runs import events, finish_here, make_run, spec_of
from tests.student_trainer.train.students import CPU, load_student
from tests.support.programs import Program

END, TURN_END = "<|endoftext|>", "<|im_end|>"


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    turns = [{"role": "user", "content": "Ada has"}, {"role": "assistant", "content": "3 apples."}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    return path


def test_a_turns_end_is_exported_and_told(
    models: Models,
    conversations: Path,
    hf_teacher: Program,
    tmp_path: Path,
) -> None:
    optimizer = {"max_steps": 1, "micro_batch_size": 2, "grad_accum_steps": 1}
    spec = spec_of(models.student, conversations, hf_teacher.target, optimizer=optimizer)
    run_dir = make_run(tmp_path, "run", spec)
    with capture_logs() as logs:
        assert finish_here(run_dir) == 0, events(run_dir)
    tokenizer = AutoTokenizer.from_pretrained(models.student)
    exported = GenerationConfig.from_pretrained(run_dir.final_path)
    assert tokenizer.convert_ids_to_tokens(exported.eos_token_id) == [END, TURN_END]
    told = [str(each) for each in logs if "end their texts with different tokens" in str(each)]
    assert len(told) == 1
    assert TURN_END in told[0]
    assert END not in told[0]


@pytest.mark.parametrize("named", [[], None, 5, [5, 6]])
def test_the_end_that_data_teach_is_exported_though_the_settings_name_others(
    models: Models, tmp_path: Path, named: Any
) -> None:
    student = load_student(StudentConfig(model=str(models.student)), tmp_path)
    end = student.tokenizer.eos_token_id
    student.plain.generation_config.eos_token_id = named
    student.add_end_ids([end])
    ids = student.plain.generation_config.eos_token_id
    others = named if isinstance(named, list) else [named] if named else []
    assert (ids if isinstance(ids, list) else [ids]) == [*others, end]


def test_the_same_ends_are_not_told(
    models: Models,
    conversations: Path,
    hf_teacher: Program,
    tmp_path: Path,
) -> None:
    student = shutil.copytree(models.student, tmp_path / "student")
    settings = student / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_bytes()), "eos_token_id": 5}))
    rows = tmp_path / "plain.jsonl"
    rows.write_text(json.dumps({"prompt": "Ada has", "completion": " 3 apples."}) + "\n")
    optimizer = {"max_steps": 1, "micro_batch_size": 2, "grad_accum_steps": 1}
    told = []
    for name, model in (("same", models.student), ("other", student)):
        run_dir = make_run(tmp_path, name, spec_of(model, rows, hf_teacher.target, optimizer=optimizer))
        with capture_logs() as logs:
            assert finish_here(run_dir) == 0, events(run_dir)
        told.append("end their texts with different tokens" in str(logs))
    assert told == [False, True]


def test_rollouts_end_with_a_turn(models: Models) -> None:
    student = load_student(StudentConfig(model=str(models.student)), models.student)
    ends = [int(each) for each in student.tokenizer.convert_tokens_to_ids([END, TURN_END])]
    student.add_end_ids(ends[1:])
    assert student.end_ids == ends
    sampler = LocalSampler(
        student,
        device=CPU,
        autocast=contextlib.nullcontext,
        vocab_size=len(student.tokenizer),
        num_likeliest=1,
    )
    generation = RolloutConfig(max_new_tokens=200, samples_per_prompt=16, temperature=5.0)
    (texts,) = sampler.write([np.array([5, 6], np.int32)], generation, max_sequence_tokens=256, seeds=[0])
    assert any(text.token_ids[-1] == ends[1] for text in texts)
    for text in texts:
        assert text.finished == (text.token_ids[-1] in ends)
        assert not np.isin(text.token_ids[:-1], ends).any()
