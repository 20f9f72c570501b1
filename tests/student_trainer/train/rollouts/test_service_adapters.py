"""Versions of an adapter in a rollout service: the next one is loaded while the one before is written with, where there is room."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoRequest
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.train.rollouts.remote_sampler import RemoteSampler, RolloutQuery
from stillhouse.student_trainer.train.rollouts.service_adapters import ServiceAdapters
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher


@contextmanager
def writer(models: Models, directory: Path, *, slots: int) -> Iterator[Program]:
    options = ["--dtype", "float32", "--threads", "1", "--max-adapters", str(slots)]
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher, engine="hf", directory=directory, options=options, environment=mark
        ) as program,
    ):
        yield program


def unheard(cancel: Callable[[], object]) -> None:
    """Ends no call."""


def loaded(stub: TeacherServiceStub) -> list[str]:
    return sorted(each.name[:5] for each in stub.GetTeacherInfo(GetTeacherInfoRequest()).adapters)


def test_the_next_version_is_loaded_beside_the_one_that_is_written_with(
    models: Models, tmp_path: Path
) -> None:
    with writer(models, tmp_path, slots=2) as program, grpc.insecure_channel(program.target) as channel:
        stub, adapters = TeacherServiceStub(channel), ServiceAdapters(program.target, "run")
        with adapters.use(stub, models.adapter_a, 0, unheard) as (first, _):
            with adapters.use(stub, models.adapter_b, 1, unheard) as (second, _):
                assert first.startswith("run/0-")
                assert second.startswith("run/1-")
                assert loaded(stub) == ["run/0", "run/1"]
            assert loaded(stub) == ["run/0", "run/1"], "the newest one stays for the next call"
        assert loaded(stub) == ["run/1"]
        with adapters.use(stub, models.adapter_a, 2, unheard):
            adapters.unload_unused(lambda: stub)
            assert loaded(stub) == ["run/2"]
        adapters.unload_unused(lambda: stub)
        assert loaded(stub) == []


def test_a_service_with_one_slot_takes_the_next_version_once_the_one_before_is_not_needed(
    models: Models, tmp_path: Path
) -> None:
    with writer(models, tmp_path, slots=1) as program, grpc.insecure_channel(program.target) as channel:
        stub, adapters = TeacherServiceStub(channel), ServiceAdapters(program.target, "run")
        seen: list[list[str]] = []

        def write_next() -> None:
            with adapters.use(stub, models.adapter_b, 1, unheard):
                seen.append(loaded(stub))

        following = threading.Thread(target=write_next, daemon=True)
        with adapters.use(stub, models.adapter_a, 0, unheard):
            following.start()
            following.join(0.5)
            assert following.is_alive()
            assert loaded(stub) == ["run/0"]
        following.join(30)
        assert seen == [["run/1"]]


def test_texts_come_as_soon_as_they_end(models: Models, tmp_path: Path) -> None:
    with writer(models, tmp_path, slots=2) as program:
        with grpc.insecure_channel(program.target) as channel:
            info = TeacherServiceStub(channel).GetTeacherInfo(GetTeacherInfoRequest())
        sampler = RemoteSampler(
            TeacherConfig(targets=(program.target,)),
            field="contexts[0].student",
            run_name="run",
            tokenizer_fingerprint=info.tokenizer_fingerprint,
            vocab_size=info.vocab_size,
            num_likeliest=4,
            end_ids=(),
            clean=True,
        )
        queries = [
            RolloutQuery(
                token_ids=np.array([5, 6, 7], np.int32),
                seed=number,
                max_new_tokens=room,
                adapter=models.adapter_a,
                version=0,
            )
            for number, room in enumerate((40, 1, 20))
        ]
        try:
            sampler.probe()
            written = sampler.sample(
                queries, RolloutConfig(max_new_tokens=40, samples_per_prompt=2), lambda _: None
            )
            place, texts = next(written)
            assert (place, [len(each.token_ids) for each in texts]) == (1, [1, 1])
            rest = dict(written)
            assert sorted(rest) == [0, 2]
            again = dict(
                sampler.sample(
                    queries, RolloutConfig(max_new_tokens=40, samples_per_prompt=2), lambda _: None
                )
            )
            for number, several in {**rest, place: texts}.items():
                for text, other in zip(several, again[number], strict=True):
                    np.testing.assert_array_equal(text.token_ids, other.token_ids)
        finally:
            sampler.close()


@pytest.mark.parametrize("taken", [True, False])
def test_a_call_that_is_given_up_frees_its_adapter(models: Models, tmp_path: Path, *, taken: bool) -> None:
    with writer(models, tmp_path, slots=1) as program, grpc.insecure_channel(program.target) as channel:
        stub, adapters = TeacherServiceStub(channel), ServiceAdapters(program.target, "run")
        with pytest.raises(ValueError, match="given up"), adapters.use(stub, models.adapter_a, 0, unheard):
            raise ValueError("given up")
        if taken:
            with adapters.use(stub, models.adapter_b, 1, unheard):
                assert loaded(stub) == ["run/1"]
        adapters.unload_unused(lambda: stub)
        assert loaded(stub) == []


def test_a_load_that_hangs_ends_when_its_call_is_given_up(models: Models, tmp_path: Path) -> None:
    with writer(models, tmp_path, slots=1) as program, grpc.insecure_channel(program.target) as channel:
        stub, adapters = TeacherServiceStub(channel), ServiceAdapters(program.target, "run")
        assert loaded(stub) == []
        cancels: queue.Queue[Callable[[], object]] = queue.Queue()
        codes: list[grpc.StatusCode] = []

        def load() -> None:
            with pytest.raises(grpc.RpcError) as caught, adapters.use(stub, models.adapter_a, 0, cancels.put):
                pass
            codes.append(caught.value.code())

        program.process.send_signal(signal.SIGSTOP)
        try:
            loading = threading.Thread(target=load, daemon=True)
            loading.start()
            cancel = cancels.get(timeout=30)
            loading.join(0.5)
            assert loading.is_alive(), "the service does not answer"
            cancel()
            loading.join(30)
            assert codes == [grpc.StatusCode.CANCELLED]
            adapters.unload_unused(lambda: stub)  # waits for nothing, as nothing was loaded
        finally:
            program.process.send_signal(signal.SIGCONT)
