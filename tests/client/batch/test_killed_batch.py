"""Batches that are killed with -9, of the client or the teacher, at random moments: every row once, in order, unchanged."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillhouse.client.api import (
    BatchSettings,
    BatchSummary,
    Listeners,
    Sampling,
    StillhouseError,
    Teacher,
    generate_file,
)
from stillhouse.client.batch.input_rows import read_lines
from stillhouse.client.batch.journal import Header, Journal, Position, RowRecord
from stillhouse.client.batch.ordered_output import Output, OutputPaths
from stillhouse.protos.errors import Reason, to_status
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.distributions import encode
from tests.client.teacher.odd_services import TcpLine, odd_service
from tests.conftest import Models
from tests.support.networks.tcp_proxy import TcpProxy
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher

NUM_ROWS = 120
DEADLINE_S = 120.0
SAMPLING = Sampling(seed=7, max_new_tokens=10)


def prompts(path: Path) -> Path:
    chooser = random.Random(1)
    rows = [
        {"id": index, "prompt": f"Ada has {index}", "num_samples": chooser.choice([1, 1, 2])}
        | ({"max_new_tokens": chooser.randint(1, 40)})
        for index in range(NUM_ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def undisturbed(hf_teacher: Program, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Returns the output of an undisturbed batch."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Teacher(hf_teacher.target) as teacher:
        answer(teacher, prompts(folder / "in.jsonl"), folder / "out.jsonl")
    return (folder / "out.jsonl").read_bytes()


def answer(teacher: Teacher, source: Path, out: Path) -> BatchSummary:
    return generate_file(teacher, source, out, BatchSettings(sampling=SAMPLING, max_inflight=32))


@contextmanager
def client(target: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs the command as a separate process, killed when the block ends."""
    arguments = [
        "--in",
        folder / "in.jsonl",
        "--out",
        folder / "out.jsonl",
        "--seed",
        7,
        "--max-new-tokens",
        10,
    ]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "stillhouse.client",
                "--teacher",
                target,
                "generate",
                "--max-inflight",
                "32",
                *map(str, arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def num_answered(folder: Path) -> int:
    """Returns the number of rows in the journal, written or not."""
    journal = folder / "out.jsonl.journal"
    return journal.read_bytes().count(b'{"row":') if journal.exists() else 0


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Waits until `count` rows are completed."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        if num_answered(folder) >= count:
            return
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, f"no {count} rows after {DEADLINE_S} s"
        time.sleep(0.01)  # another process writes the file


@pytest.mark.slow
def test_a_batch_survives_kills_of_client_and_teacher(
    models: Models, undisturbed: bytes, tmp_path: Path
) -> None:
    prompts(tmp_path / "in.jsonl")
    out = tmp_path / "out.jsonl"
    moments = random.Random(3)

    def teacher(mark: dict[str, str]) -> Program:
        options = ["--dtype", "float32", "--threads", "1", "--listen", target]
        return start_teacher(
            models.teacher, engine="hf", directory=tmp_path, options=options, environment=mark
        )

    target = f"unix:{tmp_path}/t"
    with no_process_left() as mark:
        serving = teacher(mark)
        try:
            for _ in range(3):
                more = num_answered(tmp_path) + moments.randint(3, 15)
                with client(target, tmp_path) as process:
                    wait_for_rows(tmp_path, more, process)
                assert undisturbed.startswith(out.read_bytes()[: out.read_bytes().rfind(b"\n") + 1])
            with client(target, tmp_path) as process:
                wait_for_rows(tmp_path, num_answered(tmp_path) + 5, process)
                serving.kill()
                serving = teacher(mark)
                assert process.wait(DEADLINE_S) == 0, (tmp_path / "log").read_text()
        finally:
            serving.kill()
    assert "Trying again in" in (tmp_path / "log").read_text()
    assert out.read_bytes() == undisturbed


def test_a_lost_connection_costs_only_unfinished_samples(
    hf_teacher: Program, undisturbed: bytes, tmp_path: Path
) -> None:
    prompts(tmp_path / "in.jsonl")
    lost: list[StillhouseError] = []
    cut_at = {5, 40, 80}
    with TcpLine(hf_teacher.target) as line, Teacher(line.target) as teacher:

        def cut(rows: int) -> None:
            if rows in cut_at:
                cut_at.discard(rows)
                line.cut()

        listeners = Listeners(progress=lambda now: cut(now.rows), lost=lambda error, _: lost.append(error))
        settings = BatchSettings(sampling=SAMPLING, max_inflight=32)
        generate_file(teacher, tmp_path / "in.jsonl", tmp_path / "out.jsonl", settings, listeners)
    assert lost
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed


def test_replicas_share_a_batch_and_take_over_the_rows_of_a_lost_one(
    hf_teacher: Program, undisturbed: bytes, tmp_path: Path
) -> None:
    prompts(tmp_path / "in.jsonl")
    with (
        TcpProxy(hf_teacher.target) as network,
        Teacher(f"unix:{tmp_path}/nobody") as silent,
        Teacher(network.target) as first,
        Teacher(hf_teacher.target) as second,
    ):
        lost: list[StillhouseError] = []
        listeners = Listeners(
            progress=lambda now: network.become("cut") if now.rows == 20 else None,
            lost=lambda error, _: lost.append(error),
        )
        settings = BatchSettings(sampling=SAMPLING, max_inflight=32)
        generate_file(
            [silent, first, second], tmp_path / "in.jsonl", tmp_path / "out.jsonl", settings, listeners
        )
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed
    assert any(network.target in error.message for error in lost), "it had a part that it lost"


def test_services_that_would_generate_other_text_are_refused(hf_teacher: Program, tmp_path: Path) -> None:
    prompts(tmp_path / "in.jsonl")
    with (
        odd_service(GetTeacherInfo=_info) as target,
        Teacher(target) as other,
        Teacher(hf_teacher.target) as teacher,
        pytest.raises(StillhouseError, match="with another model_fingerprint") as caught,
    ):
        generate_file([teacher, other], tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert caught.value.reason is Reason.TEACHER_CHANGED


def test_only_unfinished_samples_are_generated_again(tmp_path: Path) -> None:
    asked: list[list[tuple[str, list[int]]]] = []

    def generate(request: teacher_pb2.GenerateRequest) -> Iterator[teacher_pb2.GenerateResponse]:
        asked.append([(each.text, list(each.sample_indices)) for each in request.prompts])
        breaks = len(request.prompts) == 2 and len(request.prompts[0].sample_indices) == 2
        for index, prompt in enumerate(request.prompts):
            for sample in prompt.sample_indices or [0]:
                if breaks and (index, sample) == (1, 1):
                    raise StillhouseError(Reason.DRAINING, "going down", retry_after_s=0.0)
                chunk = teacher_pb2.SampleChunk(
                    prompt_index=index,
                    sample_index=sample,
                    token_ids=encode(np.array([5], np.int32)),
                    text=f"{prompt.text}{sample}",
                    finish_reason=teacher_pb2.SampleChunk.FINISH_REASON_STOP,
                    prompt_tokens=1,
                )
                if breaks and (index, sample) == (0, 0):
                    late = StillhouseError(Reason.PROCESS_DIED, "the engine died")
                    chunk = teacher_pb2.SampleChunk(error=to_status(late))
                yield teacher_pb2.GenerateResponse(chunks=[chunk])

    rows = [{"prompt": name, "num_samples": 2} for name in ("a", "b", "c")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with odd_service(GetTeacherInfo=_info, Generate=generate) as target, Teacher(target) as teacher:
        answer(teacher, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [[each["text"] for each in row["completions"]] for row in told] == [
        ["a0", "a1"],
        ["b0", "b1"],
        ["c0", "c1"],
    ]
    # No index means sample 0, as num_samples is 1.
    every = [("a", [0, 1]), ("b", [0, 1]), ("c", [0, 1])]
    assert sorted(each for call in asked for each in call) == sorted([*every, ("a", []), ("b", [1])])


def _info(_: object) -> Iterator[teacher_pb2.GetTeacherInfoResponse]:
    yield teacher_pb2.GetTeacherInfoResponse(
        model="m", max_prompts=2, vocab_size=10, tokenizer_size=10, max_sequence_tokens=10
    )


def test_a_restarted_teacher_with_other_weights_ends_the_batch(tmp_path: Path) -> None:
    weights = ["one"]

    def info(_: object) -> Iterator[teacher_pb2.GetTeacherInfoResponse]:
        yield teacher_pb2.GetTeacherInfoResponse(model="m", max_prompts=2, model_fingerprint=weights[0])

    def generate(_: object) -> Iterator[teacher_pb2.GenerateResponse]:
        weights[0] = "other"
        raise StillhouseError(Reason.DRAINING, "going down", retry_after_s=0.0)
        yield

    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    with (
        odd_service(GetTeacherInfo=info, Generate=generate) as target,
        Teacher(target) as teacher,
        pytest.raises(StillhouseError, match="with another model_fingerprint") as caught,
    ):
        answer(teacher, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert caught.value.reason is Reason.TEACHER_CHANGED


def test_a_teacher_that_dies_of_a_row_loses_that_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillhouse.client.batch.dispatcher.MAX_ATTEMPTS", 3)

    def generate(request: teacher_pb2.GenerateRequest) -> Iterator[teacher_pb2.GenerateResponse]:
        for index, prompt in enumerate(request.prompts):
            if prompt.text == "poison":
                raise StillhouseError(Reason.PROCESS_DIED, "the engine died", retry_after_s=0.0)
            chunk = teacher_pb2.SampleChunk(
                prompt_index=index, finish_reason=teacher_pb2.SampleChunk.FINISH_REASON_STOP, prompt_tokens=1
            )
            yield teacher_pb2.GenerateResponse(chunks=[chunk])

    rows = [{"prompt": name} for name in ("a", "poison", "b", "c")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with odd_service(GetTeacherInfo=_info, Generate=generate) as target, Teacher(target) as teacher:
        summary = answer(teacher, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (summary.failed, [row["prompt"] for row in told if "error" in row]) == (1, ["poison"])


HEADER = Header(settings={"seed": 1}, teacher={"model": "m"}, started_s=0)


def test_a_batch_resumes_from_every_cut_of_journal_and_output(tmp_path: Path) -> None:
    """Whatever a kill leaves of both files, the resumed batch completes the same output."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"prompt": "{index}"}}\n' for index in range(5)))
    paths = OutputPaths(out=tmp_path / "out.jsonl")
    lines = list(read_lines(source))

    def run(numbers: list[int]) -> set[int]:
        with Output(paths, HEADER) as output:
            left = {line.number for line in lines if not output.is_answered(line)}
            for number in numbers or sorted(left):
                digest = lines[number].digest
                output.add(number, RowRecord(digest=digest, out=f"answer {number} ä\n"))
            if not numbers:
                output.finish()
            return left

    run([3, 0, 1, 4])
    journal, written = paths.journal.read_bytes(), paths.out.read_bytes()
    whole = "".join(f"answer {number} ä\n" for number in range(5)).encode()
    ends = [0, *(index + 1 for index, byte in enumerate(journal) if byte == ord("\n"))]
    for cut in sorted({*ends, *(end - 1 for end in ends[1:]), *range(0, len(journal), 41)}):
        for length in (0, len(written) // 2, len(written)):
            paths.journal.write_bytes(journal[:cut])
            paths.out.write_bytes(written[:length])
            if not journal[:cut].count(b"\n"):
                paths.out.unlink()
            run([])
            assert paths.out.read_bytes() == whole
    assert journal.count(b'{"row":') == 4


def test_waiting_rows_are_counted_and_leave_the_journal_once_written(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("1\n2\n3\n")
    lines = list(read_lines(source))
    a, b, c = (
        RowRecord(digest=line.digest, out=f"{name}\n") for line, name in zip(lines, "abc", strict=True)
    )
    paths = OutputPaths(out=tmp_path / "out.jsonl")
    with Output(paths, HEADER) as output:
        output.add(2, replace(c, is_failed=True))
        assert (output.position.rows, output.num_answered, output.num_failed) == (0, 1, 1)
    with Output(paths, HEADER) as output:
        assert [output.is_answered(line) for line in lines] == [False, False, True]
        output.add(0, a)
        output.add(1, b)
        assert output.position == Position(
            rows=3, chain=output.position.chain, out_bytes=6, failed_bytes=0, num_failed=1
        )
        output.finish()
    assert paths.out.read_text() == "a\nb\nc\n"
    journal = Journal.open(paths.journal)
    assert journal is not None
    journal.close()
    assert (journal.state.rows, journal.state.is_finished) == ({}, True)
    assert RowRecord(digest="", out="") not in journal.state.rows.values()
