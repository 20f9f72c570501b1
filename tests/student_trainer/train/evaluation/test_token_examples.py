"""Examples of an evaluation: their numbers are the definitions on dense distributions, their rows and files are bounded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.protos.evaluation.examples import FOLDER, INDEX, MAX_EVALUATIONS, place_of
from stillhouse.student_trainer.config.rules.evaluation import SetSettings
from stillhouse.student_trainer.run_dir import Attempt, RunDir
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.evaluation_sets import EvaluationRows
from stillhouse.student_trainer.train.data.token_texts import running_texts, token_text
from stillhouse.student_trainer.train.evaluation.example_files import ExampleFiles, thinned
from stillhouse.student_trainer.train.evaluation.example_plan import (
    MAX_BEFORE,
    MAX_ROW_TOKENS,
    MAX_TOKENS,
    ExamplePlan,
    choose_rows,
)
from stillhouse.student_trainer.train.evaluation.token_examples import TOP_K, ShownExamples, TokenExamples
from stillhouse.student_trainer.train.evaluation.token_scores import token_scores
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.loss.sparse import PAD_ID, SparseTargets
from tests.student_trainer.train.evaluation.test_token_scores import STUDENT, TEACHER, TEXT, K, N, V, sparse


def row(length: int, prompt: int = 1) -> Example:
    return Example(
        token_ids=np.arange(length, dtype=np.int32) % V, mask=np.arange(length) >= prompt, place="rows, row 1"
    )


def rows_of(name: str, begin: int, end: int, match: str = "exact") -> EvaluationRows:
    settings = SetSettings(name=name, field="evaluation", metrics=("kl",), match=match)
    return EvaluationRows(settings=settings, begin=begin, end=end)


def read(targets: SparseTargets | None, parts: int = 3) -> list[dict[str, Any]]:
    """The values of N targets of one row, whose logits come in several chunks."""
    example = row(N + 1)
    plan = choose_rows([example], [rows_of("", 0, 1)], 1)
    collected = TokenExamples(plan=plan, vocab_size=V)
    batch = collected.of_batch([0], [ScoredExample(example=example, answer=None)])
    here = Positions(target_ids=TEXT, weights=torch.ones(1, N), targets=targets)
    for first in range(0, N, N // parts):
        chunk = slice(first, min(N, first + N // parts))
        logits = STUDENT[:, chunk]
        scores = token_scores(logits, here.rows(chunk), vocab_size=V, named=())
        batch.take(chunk, logits, here.rows(chunk), scores)
    assert not collected.broken
    values: list[dict[str, Any]] = collected.told()["0"]["values"]
    assert len(values) == N
    return values


def test_numbers_are_those_of_dense_distributions() -> None:
    p, q = TEACHER.log_softmax(-1)[0].numpy(), STUDENT.log_softmax(-1)[0].numpy()
    kept = np.argsort(-p, axis=-1)[:, :K]
    for at, found in enumerate(read(sparse())):
        top = {token: (theirs, own) for token, theirs, own in found["top"]}
        best = np.argsort(-q[at])[:TOP_K]
        assert [each[0] for each in found["top"][:K]] == kept[at].tolist()
        assert set(top) == {*kept[at].tolist(), *best.tolist()}
        by_student = sorted(top, key=lambda token: -top[token][1])
        assert by_student[:TOP_K] == best.tolist()
        for token, (theirs, own) in top.items():
            assert own == pytest.approx(q[at, token], abs=1e-4)
            if token in kept[at]:
                assert theirs == pytest.approx(p[at, token], abs=1e-4)
            else:
                assert theirs is None, "it is in the teacher's tail"
        rest = [token for token in range(V) if token not in kept[at]]
        assert found["teacher_tail"] == pytest.approx(np.logaddexp.reduce(p[at, rest]), abs=1e-4)
        rest = [token for token in range(V) if token not in best]
        assert found["student_tail"] == pytest.approx(np.logaddexp.reduce(q[at, rest]), abs=1e-4)
        assert found["student_logprob"] == pytest.approx(q[at, int(TEXT[0, at])], abs=1e-4)
        assert found["known"] == K
        pairs = [(p[at, token], q[at, token]) for token in kept[at]]
        rest = [token for token in range(V) if token not in kept[at]]
        pairs.append((np.logaddexp.reduce(p[at, rest]), np.logaddexp.reduce(q[at, rest])))
        assert found["kl"] == pytest.approx(sum(np.exp(a) * (a - b) for a, b in pairs), abs=2e-4)


def test_a_teacher_that_knows_little_or_nothing_is_told_so() -> None:
    targets = sparse()
    targets.token_ids[:, :, 2:] = PAD_ID
    tail = torch.log1p(-targets.logprobs[:, :, :2].exp().sum(-1))
    few = SparseTargets(token_ids=targets.token_ids, logprobs=targets.logprobs, log_tail=tail)
    for found in read(few):
        assert found["known"] == 2
        assert len([each for each in found["top"] if each[1] is not None]) == 2
    for found in read(None):
        assert "kl" not in found
        assert "teacher_tail" not in found
        assert [each[1] for each in found["top"]] == [None] * TOP_K


def test_what_goes_wrong_leaves_the_evaluation_alone() -> None:
    example = row(5)
    collected = TokenExamples(plan=choose_rows([example], [rows_of("", 0, 1)], 1), vocab_size=V)
    batch = collected.of_batch([0], [ScoredExample(example=example, answer=None)])
    here = Positions(target_ids=TEXT[:, :4], weights=torch.ones(1, 4), targets=None)
    batch.take(slice(0, 4), STUDENT[:, :4], here, {})  # no cross-entropy
    assert collected.broken
    assert collected.told() == {}


def test_rows_of_all_sets_take_turns_within_the_budget() -> None:
    examples = [row(1000, 200), row(40), row(1000), *[row(300) for _ in range(20)]]
    sets = [rows_of("", 0, 2), rows_of("far", 2, 23), rows_of("quiz", 0, 3, "choices")]
    plan = choose_rows(examples, sets, 2)
    assert [(each.set_name, each.number) for each in plan.rows.values()] == [
        ("", 0),
        ("far", 0),
        ("", 1),
        ("far", 1),
    ]
    first = plan.rows[0]
    assert (first.begin, first.end) == (200 - MAX_BEFORE, 200 - MAX_BEFORE + MAX_ROW_TOKENS)
    assert first.num_targets == MAX_ROW_TOKENS - MAX_BEFORE
    assert first.targets[0] == 200
    assert (plan.rows[1].begin, plan.rows[1].end) == (0, 40)
    many = choose_rows(examples, sets, 64)
    assert sum(each.end - each.begin for each in many.rows.values()) == MAX_TOKENS
    assert len(many.rows) + many.left_out == 23
    assert choose_rows(examples, sets, 0).rows == {}


class _Tokenizer:
    """A byte-level tokenizer of single letters, as far as examples need one."""

    backend_tokenizer = SimpleNamespace(
        to_str=lambda: json.dumps(
            {
                "model": {"vocab": {chr(65 + each): each for each in range(V)}},
                "decoder": {"type": "ByteLevel"},
            }
        )
    )


def shown(number: int = 1) -> ShownExamples:
    examples = [row(6, 2) for _ in range(number)]
    plan = choose_rows(examples, [rows_of("", 0, number)], number)
    target = {"kl": 0.5, "student_logprob": -1.0, "student_tail": None, "known": 8, "top": [[3, -0.5, -1.0]]}
    values: Mapping[str, Any] = {"at": [2, 3, 4, 5], "teacher": None, "values": [target] * 4}
    return ShownExamples(plan=plan, values=dict.fromkeys(range(number), values))


def files_of(tmp_path: Path) -> tuple[ExampleFiles, Path]:
    run_dir = RunDir(tmp_path)
    return ExampleFiles(Attempt(run_dir, 1), _Tokenizer(), from_cache=True), run_dir.path


def steps(path: Path) -> list[int]:
    index = json.loads((path / INDEX).read_bytes())
    files = {each.name for each in (path / FOLDER).iterdir()} - {"index.json"}
    found = [each["step"] for each in index["evaluations"]]
    assert files == {f"{step}.json" for step in found}
    return found


def test_an_earlier_step_replaces_what_a_lost_attempt_wrote(tmp_path: Path) -> None:
    files, path = files_of(tmp_path)
    for step in (0, 10, 20, 30):
        files.write(step, "along" if step else "before", shown())
    assert steps(path) == [0, 10, 20, 30]
    files.write(20, "along", shown())
    assert steps(path) == [0, 10, 20]
    document = json.loads((path / place_of(20)).read_bytes())
    assert document["from_cache"]
    assert document["teacher_top_k"] == 8
    [only] = document["rows"]
    assert only["texts"] == ["A", "B", "C", "D", "E", "F"]
    assert [each["at"] for each in only["targets"]] == [2, 3, 4, 5]
    assert document["texts"] == {"3": "D"}
    (path / INDEX).write_text("[")
    files.write(30, "after", shown())
    assert steps(path) == [30]


def test_files_of_a_long_run_are_thinned_between_its_ends(tmp_path: Path) -> None:
    files, path = files_of(tmp_path)
    for step in range(0, 200, 2):
        files.write(step, "along", shown(), protected=[34])
    found = steps(path)
    assert len(found) <= MAX_EVALUATIONS
    assert {0, 34, 198} <= set(found)
    gaps = np.diff(found)
    assert gaps.max() <= 8 * gaps.min()
    assert thinned([{"step": 1}, {"step": 2}], 1, []) == [{"step": 1}, {"step": 2}]


def test_a_file_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    files, path = files_of(tmp_path)
    (path / "evaluations").write_text("no folder")
    files.write(0, "before", shown())
    assert (path / "evaluations").read_text() == "no folder"
    files.write(0, "before", ShownExamples(plan=ExamplePlan(), values={}))


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    smile = "☺".encode()
    assert running_texts([b"a", smile[:1], smile[1:], None], [0, 1, 2, 3]) == ["a", "", "☺", "<3>"]
    assert token_text(smile[:1], 1) == "\\xe2"
