"""Texts go to a teacher in parts as long as its prefix cache holds what came before."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from benchmarks.distillation.teacher_proxy import TeacherProxy
from stillhouse.protos.stillhouse.v1.teacher_pb2 import ScoreRequest, ScoreResponse
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.train.data.corpus import load_corpus
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers
from stillhouse.student_trainer.train.teacher.prefix_reuse import WINDOW, PrefixReuse
from stillhouse.student_trainer.train.teacher.query import TeacherQuery
from stillhouse.student_trainer.train.teacher.target_requests import training_request
from stillhouse.student_trainer.train.teacher.teacher import Demands
from tests.conftest import Models
from tests.student_trainer.train.runs import make_run, spec_of
from tests.student_trainer.train.students import make_sampler
from tests.support.programs import Program


class Reporting:
    """Hook of a proxy whose teacher reports that its cache held nothing."""

    def request(self, _request: ScoreRequest) -> None:
        """Does nothing."""

    def response(self, response: ScoreResponse) -> ScoreResponse:
        for result in response.results:
            result.reused_tokens = 0
        return response


def added(reuse: PrefixReuse, count: int, *, num_reused: int) -> bool:
    for _ in range(count):
        reuse.add(num_scored=128, num_reused=num_reused, num_new=64, target="a:1")
    return reuse.pays


def test_parts_end_when_a_window_is_computed_more_than_twice() -> None:
    reuse = PrefixReuse()
    assert added(reuse, WINDOW - 1, num_reused=0)
    with capture_logs() as logs:
        assert not added(reuse, 1, num_reused=0)
        assert not added(reuse, 2 * WINDOW, num_reused=128)
    assert [each["target"] for each in logs] == ["a:1"]


def test_parts_go_on_while_most_of_a_text_is_held() -> None:
    reuse = PrefixReuse()
    assert added(reuse, 4 * WINDOW, num_reused=64)
    assert added(reuse, WINDOW // 2, num_reused=128)
    assert added(reuse, WINDOW // 2, num_reused=0)
    assert not added(reuse, 1, num_reused=0)


def test_ends_of_few_tokens_behind_what_is_held_are_worth_their_queries() -> None:
    reuse = PrefixReuse()
    for _ in range(WINDOW):
        reuse.add(num_scored=80, num_reused=64, num_new=3, target="a:1")
    assert reuse.pays


@pytest.mark.model
def test_queries_about_further_parts_count_by_what_the_teacher_reports(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    with TeacherProxy(hf_teacher.target, Reporting) as proxy, ExitStack() as stack:
        run_dir = make_run(tmp_path, "parts", spec_of(models.student, dataset_file, proxy.target))
        config = from_proto(run_dir.effective_spec())
        tokenizer = make_sampler(models.student, num_likeliest=1)._student.tokenizer
        corpus = load_corpus(config.data, config.evaluation, tokenizer, tmp_path)
        text = tokenizer.backend_tokenizer.to_str()
        demands = Demands.from_config(
            config, tokenizer_fingerprint(text, tokenizer.special_tokens_map), text, corpus
        )
        patience = TeacherWait(stack.enter_context(run_dir.open_attempt(1)), lambda: False, 30)
        teachers = OnlineTeachers.connect(config, demands, run_dir, patience=patience, stack=stack)
        stream = teachers.open_stream(training_request(config.loss, 0), cacheable=False)
        stack.callback(stream.close)
        reuse = next(iter(teachers.members.values())).prefix_reuse

        def score(first: int, num_scored: int) -> None:
            for number in range(first, first + WINDOW):
                ids = np.arange(2, 12, dtype=np.int32)
                query = TeacherQuery(token_ids=ids, start=7, place="a", num_scored=num_scored)
                stream.submit(number, query)
                assert stream.get_result(number, patience).num_rows == 3

        score(0, 0)
        assert reuse.pays
        score(WINDOW, 7)
        assert not reuse.pays
