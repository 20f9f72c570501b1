"""Several services of one teacher: who gets how much, what becomes of it when they break, hang or change, and whom a run still trusts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.distillation.teacher_proxy import TeacherProxy
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc import tokens as auth_tokens
from stillhouse.protos.rpc.pool import service_pool
from stillhouse.protos.rpc.pool.load_balancing import Load
from stillhouse.protos.rpc.tokens import Scope
from stillhouse.protos.stillhouse.v1.teacher_pb2 import CAPABILITY_CODED_QUERIES, ScoreRequest, ScoreResponse
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.config.schema import RolloutConfig, StudentConfig
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.train.data.corpus import load_corpus
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.student.student import load_tokenizer
from stillhouse.student_trainer.train.teacher import credentials, endpoints
from stillhouse.student_trainer.train.teacher import teacher as client
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers
from stillhouse.student_trainer.train.teacher.query import TeacherQuery
from stillhouse.student_trainer.train.teacher.streams.generated import TeacherSample, TextStream
from stillhouse.student_trainer.train.teacher.streams.scored import ScoreStream
from stillhouse.student_trainer.train.teacher.target_requests import training_request
from stillhouse.student_trainer.train.teacher.teacher import Demands, TeacherClient
from tests.conftest import Models
from tests.student_trainer.train.runs import (
    failure,
    final_weights,
    finish_here,
    make_run,
    metric,
    spec_of,
    start,
    waits,
)
from tests.support.networks.tcp_proxy import TcpProxy
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher
from tests.support.teacher_without_draws import TeacherWithoutDraws

DEADLINE_S = 60.0
QUESTIONS = [
    TeacherQuery(
        token_ids=np.arange(5 + number, 30 + 2 * number, dtype=np.int32), start=4, place=f"row {number}"
    )
    for number in range(16)
]


class World:
    """A run directory, and the teachers of a run in this process."""

    def __init__(self, models: Models, data: Path, root: Path, stack: ExitStack) -> None:
        self._models, self._data, self._root, self._stack = models, data, root, stack
        self._number = 0

    def connect(self, targets: Sequence[str], **teacher: Any) -> tuple[TeacherClient, TeacherWait, RunDir]:
        """The teacher, reached through `targets`."""
        spec = spec_of(self._models.student, self._data, targets[0])
        spec["teachers"][0] |= {"targets": list(targets), **teacher}
        self._number += 1
        run_dir = make_run(self._root, f"asking-{self._number}", spec)
        config = from_proto(run_dir.effective_spec())
        tokenizer = load_tokenizer(StudentConfig(model=str(self._models.student)), self._root)
        text = tokenizer.backend_tokenizer.to_str()
        fingerprint = tokenizer_fingerprint(text, tokenizer.special_tokens_map)
        corpus = load_corpus(config.data, config.evaluation, tokenizer, self._root)
        demands = Demands.from_config(config, fingerprint, text, corpus)
        patience = TeacherWait(self._stack.enter_context(run_dir.open_attempt(1)), lambda: False, DEADLINE_S)
        teachers = OnlineTeachers.connect(config, demands, run_dir, patience=patience, stack=self._stack)
        (teacher_,) = teachers.members.values()
        self.request = training_request(config.loss, 0).to_config(teacher_.config)
        return teacher_, patience, run_dir

    def scores(self, teacher: TeacherClient) -> ScoreStream:
        """A stream of scores, closed at the end of the test."""
        stream = ScoreStream(teacher, self.request)
        self._stack.callback(stream.close)
        return stream

    def texts(self, teacher: TeacherClient) -> TextStream:
        """A stream of texts, closed at the end of the test."""
        generation = RolloutConfig(max_new_tokens=6, samples_per_prompt=2)
        stream = TextStream(teacher, generation, self.request)
        self._stack.callback(stream.close)
        return stream

    def proxy(self, target: str, **options: float) -> TcpProxy:
        """A bad network before `target`."""
        return self._stack.enter_context(TcpProxy(target, **options))


@pytest.fixture
def world(models: Models, dataset_file: Path, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(models, dataset_file, tmp_path, stack)


def ask_scores(
    stream: ScoreStream, patience: TeacherWait, meanwhile: Callable[[], None] = lambda: None
) -> list[Distributions]:
    for number, asked in enumerate(QUESTIONS):
        stream.submit(number, asked)
    meanwhile()
    return [stream.get_result(number, patience) for number in range(len(QUESTIONS))]


def ask_texts(
    stream: TextStream, patience: TeacherWait, meanwhile: Callable[[], None] = lambda: None
) -> list[list[TeacherSample]]:
    for number, asked in enumerate(QUESTIONS):
        stream.submit(number, asked.token_ids, seed=number, max_new_tokens=6, place=asked.place)
    meanwhile()
    return [stream.get_result(number, patience) for number in range(len(QUESTIONS))]


def loads(teacher: TeacherClient) -> list[Load]:
    return [each.load for each in teacher.endpoints]


def assert_same(found: Distributions | None, expected: Distributions | None) -> None:
    assert found is not None
    assert expected is not None
    for name in ("token_ids", "logprobs", "target_logprobs", "log_tail"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("how", ["cut", "hangs"])
@pytest.mark.faults(row=1)
def test_what_a_lost_service_owes_is_answered_by_the_other(
    world: World, hf_teacher: Program, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for name in ("PING_AFTER_S", "PING_EVERY_S"):
        monkeypatch.setattr(service_pool, name, 0.5)
    monkeypatch.setattr(endpoints, "PING_TIMEOUT_S", 0.5)
    network = world.proxy(hf_teacher.target)
    teacher, patience, run_dir = world.connect([network.target, hf_teacher.target])
    calm = ask_scores(world.scores(teacher), patience)
    stream = world.scores(teacher)
    network.become("silent")

    def lose() -> None:
        assert loads(teacher)[0].num_outstanding > 0
        if how == "cut":
            network.become("cut")

    for found, expected in zip(ask_scores(stream, patience, lose), calm, strict=True):
        assert_same(found, expected)
    lost, kept = loads(teacher)
    assert lost.num_returned > 0
    assert lost.num_outstanding == kept.num_outstanding == kept.outstanding_cost == kept.num_returned == 0
    assert lost.num_answered + kept.num_answered == 2 * len(QUESTIONS)
    assert not waits(run_dir)

    network.become("fine")
    before = loads(teacher)[0].num_answered
    deadline = time.monotonic() + DEADLINE_S
    while loads(teacher)[0].num_answered == before:  # it is given work again
        assert time.monotonic() < deadline
        ask_scores(stream, patience)


def test_texts_of_a_lost_service_are_written_by_the_other(world: World, hf_teacher: Program) -> None:
    network = world.proxy(hf_teacher.target)
    teacher, patience, _ = world.connect([network.target, hf_teacher.target])
    calm = ask_texts(world.texts(teacher), patience)
    stream = world.texts(teacher)
    network.become("silent")
    texts = ask_texts(stream, patience, lambda: network.become("cut"))
    assert loads(teacher)[0].num_returned > 0
    for several, expected in zip(texts, calm, strict=True):
        assert [each.token_ids.tolist() for each in several] == [each.token_ids.tolist() for each in expected]
        for text, other in zip(several, expected, strict=True):
            assert_same(text.distributions, other.distributions)


@pytest.mark.faults(row=3)
def test_with_no_service_left_the_run_waits_and_goes_on(world: World, hf_teacher: Program) -> None:
    networks = [world.proxy(hf_teacher.target) for _ in range(2)]
    teacher, patience, run_dir = world.connect([each.target for each in networks])
    stream = world.scores(teacher)

    def lose() -> None:
        for each in networks:
            each.become("cut")
        threading.Thread(target=mend, daemon=True).start()

    def mend() -> None:
        wait_for(lambda: bool(waits(run_dir)))
        networks[1].become("fine")

    for each in networks:
        each.become("silent")
    assert len(ask_scores(stream, patience, lose)) == len(QUESTIONS)
    assert waits(run_dir) == ["WAITING_FOR_TEACHER", ""]


@pytest.mark.faults(row=4)
def test_a_slow_service_gets_less(world: World, hf_teacher: Program) -> None:
    slow = world.proxy(hf_teacher.target, delay_s_per_kib=0.02)
    teacher, patience, _ = world.connect([slow.target, hf_teacher.target])
    stream = world.scores(teacher)
    for _ in range(6):
        ask_scores(stream, patience)
    first, second = loads(teacher)
    assert second.num_answered > 2 * first.num_answered
    assert first.num_answered > 0


def test_a_token_that_is_replaced_is_read_again(
    world: World, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, secret = tmp_path / "tokens.json", tmp_path / "secret"
    secret.write_text(auth_tokens.create(tokens, name="first", scopes=[Scope.INFER], lifetime_s=3600)[0])
    file = tmp_path / "credentials.toml"
    file.write_text(f'[lab]\ntoken_file = "{secret}"\n')
    monkeypatch.setenv(credentials.CREDENTIALS_VARIABLE, str(file))
    options = ["--dtype", "float32", "--threads", "1", "--tokens", str(tokens)]
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher, engine="hf", directory=tmp_path / "t", options=options, environment=mark
        ) as program,
    ):
        network = world.proxy(program.target)
        teacher, patience, run_dir = world.connect([network.target], credential="lab")
        stream = world.scores(teacher)
        ask_scores(stream, patience)
        auth_tokens.revoke(tokens, "first")
        second, _ = auth_tokens.create(tokens, name="second", scopes=[Scope.INFER], lifetime_s=3600)

        def replace() -> None:
            wait_for(lambda: (error := stream._pool.last_error) is not None and "revoked" in error.message)
            secret.write_text(second)

        network.become("cut")
        network.become("fine")
        threading.Thread(target=replace, daemon=True).start()
        assert len(ask_scores(stream, patience)) == len(QUESTIONS)
        assert waits(run_dir) == ["WAITING_FOR_TEACHER", ""]

        secret.write_text("wrong")
        with pytest.raises(StillhouseError) as refused:
            world.connect([program.target], credential="lab")
        assert refused.value.reason is Reason.UNAUTHENTICATED


STEPS = 30


def _spec(models: Models, data: Path, targets: Sequence[str]) -> dict[str, Any]:
    spec = spec_of(models.student, data, targets[0], optimizer={"max_steps": STEPS})
    spec["teachers"][0] |= {"targets": list(targets), "prefetch_steps": 1}
    return spec


@pytest.mark.slow
@pytest.mark.faults(row=1)
def test_services_die_change_and_return_and_the_weights_are_the_same_bit_for_bit(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    calm = make_run(tmp_path, "calm", _spec(models, dataset_file, [hf_teacher.target]))
    assert finish_here(calm) == 0
    targets = [f"unix:{tmp_path}/{name}.socket" for name in ("a", "b")]
    run_dir = make_run(tmp_path, "disturbed", _spec(models, dataset_file, targets))
    log = run_dir.log_path(1)
    with ExitStack() as stack:
        mark = stack.enter_context(no_process_left())

        def teacher(model: Path, number: int) -> Program:
            options = ["--dtype", "float32", "--threads", "1", "--listen", targets[number]]
            name = tmp_path / f"teacher-{number}-{time.monotonic_ns()}"
            started = start_teacher(model, engine="hf", directory=name, options=options, environment=mark)
            return stack.enter_context(started)

        first, second = teacher(models.teacher, 0), teacher(models.teacher, 1)
        process = start(run_dir, 1, mark)
        stack.callback(process.wait)
        stack.callback(process.kill)
        wait_for(lambda: len(metric(run_dir, "train/loss")) >= 2)
        with halted(process.pid):
            assert process.poll() is None
            first.kill()
            teacher(models.student, 0)  # another model at the address of the first
        wait_for(lambda: b"a teacher's service is refused" in log.read_bytes())

        other = make_run(tmp_path, "begun", _spec(models, dataset_file, targets[::-1]))
        assert finish_here(other) == EXIT_FAILED
        assert "is not the one that this run began with: its model_fingerprint is" in failure(other)

        with halted(process.pid):
            assert process.poll() is None
            second.kill()
        wait_for(lambda: bool(waits(run_dir)))
        teacher(models.teacher, 1)
        assert process.wait(DEADLINE_S) == 0, log.read_text()[-2000:]
    assert waits(run_dir) == ["WAITING_FOR_TEACHER", ""]
    assert metric(run_dir, "train/loss") == metric(calm, "train/loss")
    assert metric(run_dir, "teacher/breaks")[STEPS] >= 2
    assert metric(run_dir, "teacher/service1/answered")[STEPS] > 0
    assert metric(calm, "teacher/outstanding")[STEPS] == 0
    assert not metric(calm, "teacher/service0/answered"), "one service alone has no numbers of its own"
    expected, found = final_weights(calm), final_weights(run_dir)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(weight, found[name], err_msg=name)


@contextmanager
def halted(pid: int) -> Iterator[None]:
    """A process that does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not happened():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


def test_a_teacher_that_was_never_reached_is_given_up_with_the_time_that_it_had(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_CONTACT_S", 0.3)
    with pytest.raises(StillhouseError) as caught:
        world.connect(["127.0.0.1:9"])
    assert caught.value.reason is Reason.TEACHER_UNREACHABLE
    assert str(caught.value).startswith("No teacher was reached within 0.3 s, the longest wait of a run")
    assert "No teacher answers at 127.0.0.1:9" in str(caught.value)


def test_queried_ids_go_out_coded_and_plain_to_a_teacher_that_does_not_read_that(
    world: World, hf_teacher: Program
) -> None:
    generator, answers = np.random.default_rng(5), {}
    forms: dict[str, set[int]] = {}

    class Watch:
        def __init__(self, name: str) -> None:
            self._name = name

        def request(self, request: ScoreRequest) -> None:
            if request.HasField("sequence"):
                forms.setdefault(self._name, set()).add(request.sequence.query_token_ids.dtype)

        def response(self, response: ScoreResponse) -> ScoreResponse:
            return response

    queries = [
        replace(each, query_token_ids=generator.integers(-1, 384, (each.num_rows, 40)).astype(np.int32))
        for each in QUESTIONS
    ]
    with (
        TeacherWithoutDraws(hf_teacher.target, CAPABILITY_CODED_QUERIES) as before,
        TeacherProxy(before.target, lambda: Watch("before")) as watched,
        TeacherProxy(hf_teacher.target, lambda: Watch("now")) as direct,
    ):
        for target in (watched.target, direct.target):
            teacher, patience, _ = world.connect([target])
            stream = world.scores(teacher)
            for number, each in enumerate(queries):
                stream.submit(number, each)
            answers[target] = [stream.get_result(number, patience) for number in range(len(queries))]
            stream.close()
    assert forms == {"before": {Tensor.DATA_TYPE_INT32}, "now": {Tensor.DATA_TYPE_DIFFERENCES}}
    for old, new in zip(*answers.values(), strict=True):
        assert old.query_logprobs is not None
        np.testing.assert_array_equal(np.isneginf(old.query_logprobs), np.isneginf(new.query_logprobs))
        np.testing.assert_allclose(old.query_logprobs, new.query_logprobs, atol=1e-5)
