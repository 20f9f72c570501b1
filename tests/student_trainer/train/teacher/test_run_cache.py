"""Caches in training: the same curve from a teacher, through a cache and out of one; and what a build keeps, asks and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stillhouse.protos.cache.reader import CacheReader
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.config.settled.matmul_dtype import Processor
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.runs.api.spec_resolution import Host, resolve
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceSlots
from tests.conftest import Models
from tests.student_trainer.config.specs import spec_of as spec_message
from tests.student_trainer.train.runs import events, failure, finish_here, make_run, metric, spec_of, start
from tests.support.networks.counting_proxy import counting_proxy
from tests.support.programs import Program

TOP_K, EVAL_TOP_K = 24, 20
NUM_TRAIN, NUM_EVAL = 58, 6
DEADLINE_S = 100.0


def spec(
    models: Models, rows: Path, target: str | None, mode: str | None, /, **further: Any
) -> dict[str, Any]:
    """Two epochs with an evaluation, over the float16 wire; `mode` is that of the cache."""
    made = spec_of(
        models.student,
        rows,
        target,
        **{
            "loss": {"top_k": TOP_K},
            "evaluation": {"top_k": EVAL_TOP_K, "every_steps": 5},
            "optimizer": {"epochs": 2},
            **further,
        },
    )
    if target is not None:
        made["teachers"][0]["logprob_dtype"] = "float16"
    if mode is not None:
        made["cache"] = {"path": "caches/set", "mode": mode}
    return made


def run(data_dir: Path, name: str, values: Mapping[str, Any], code: int = 0) -> RunDir:
    run_dir = make_run(data_dir, name, values)
    assert finish_here(run_dir) == code, events(run_dir)
    return run_dir


def curves(run_dir: RunDir) -> dict[str, dict[int, float]]:
    return {name: metric(run_dir, name) for name in ("train/loss", "eval/kl", "eval/agreement")}


LOSSES: dict[str, dict[str, Any]] = {
    "top_k_and_tail, compact": {"top_k": TOP_K},
    "tempered": {"top_k": TOP_K, "temperature": 2.0},
    "sampled": {"top_k": TOP_K, "sparse_target": "sampled", "num_samples": 12},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_online_through_and_out_of_a_cache_is_one_curve_and_the_second_epoch_asks_nobody(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path, loss: str
) -> None:
    further = {"loss": LOSSES[loss]}
    proxy, counts = counting_proxy(hf_teacher.target)

    def asking(mode: str | None) -> dict[str, Any]:
        made = spec(models, dataset_file, proxy.target, mode, **further)
        made["teachers"][0]["logprob_dtype"] = "compact" if "compact" in loss else "float16"
        return made

    with proxy:
        online = run(tmp_path, "online", asking(None))
        assert (counts.asked(TOP_K), counts.asked(EVAL_TOP_K)) == (2 * NUM_TRAIN, NUM_EVAL)
        through = run(tmp_path, "through", asking("write_through"))
        assert (counts.asked(TOP_K), counts.asked(EVAL_TOP_K)) == (3 * NUM_TRAIN, 2 * NUM_EVAL)
    assert len(CacheReader(tmp_path / "caches" / "set")) == NUM_TRAIN + NUM_EVAL
    only = run(tmp_path, "only", spec(models, dataset_file, None, "only", **further))

    expected = curves(online)
    assert len(expected["train/loss"]) == 15
    assert len(expected["eval/kl"]) == 4
    for cached in (through, only):
        for name, points in curves(cached).items():
            assert points == pytest.approx(expected[name], abs=1e-5), name
    assert metric(only, "teacher/sequences_asked")[15] == 0


def build_spec(models: Models, data: Path, target: str, **further: Any) -> dict[str, Any]:
    return {
        **spec(models, data, target, "write_through", checkpoint={"every_steps": 2}, **further),
        "task": "cache",
    }


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.01)


def stored(data_dir: Path) -> int:
    path = data_dir / "caches" / "set"
    return len(CacheReader(path)) if path.is_dir() else 0


def test_a_killed_build_goes_on_without_asking_for_what_is_stored(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    proxy, counts = counting_proxy(hf_teacher.target)
    with proxy:
        run_dir = make_run(tmp_path, "build", build_spec(models, dataset_file, proxy.target))
        process = start(run_dir)
        try:
            wait_for(lambda: stored(tmp_path) >= 16, "a stored shard")
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
        kept = stored(tmp_path)
        asked = counts.asked(TOP_K) + counts.asked(EVAL_TOP_K)
        assert 16 <= kept <= NUM_TRAIN + NUM_EVAL
        assert finish_here(run_dir, attempt=2) == 0
        further = counts.asked(TOP_K) + counts.asked(EVAL_TOP_K) - asked
    assert further == NUM_TRAIN + NUM_EVAL - kept
    assert stored(tmp_path) == NUM_TRAIN + NUM_EVAL

    began = events(run_dir, "started")
    assert [each["total_steps"] for each in began] == [8, 8]
    assert began[1]["step"] == kept // 8
    assert metric(run_dir, "cache/sequences")[8] == NUM_TRAIN + NUM_EVAL
    assert 50 < metric(run_dir, "cache/bytes_per_token")[8] < 500
    told = json.loads((run_dir.path / "exports" / "cache.json").read_text())
    assert told["sequences"] == NUM_TRAIN + NUM_EVAL
    linked = {path.name for path in (run_dir.path / "exports" / "cache").iterdir()}
    assert linked == {each["name"] for each in told["shards"]}

    only = run(tmp_path, "only", spec(models, dataset_file, None, "only"))
    assert events(only)[-1]["kind"] == "completed"


@pytest.fixture(scope="module")
def built(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A data directory with a whole cache."""
    data_dir = tmp_path_factory.mktemp("built")
    run(data_dir, "build", build_spec(models, dataset_file, hf_teacher.target))
    return data_dir


def refused(data_dir: Path, name: str, values: Mapping[str, Any]) -> str:
    return failure(run(data_dir, name, values, code=EXIT_FAILED))


def test_what_a_cache_lacks_is_counted_before_the_first_step(
    built: Path, models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    longer = tmp_path / "longer.jsonl"
    more = [json.dumps({"prompt": "Zoe", "completion": f" has {n} eggs."}) for n in range(3)]
    longer.write_text(dataset_file.read_text() + "\n".join(more) + "\n")
    told = refused(built, "lacking", spec(models, longer, None, "only", data={"eval_fraction": 0}))
    # Held-out rows were asked about with another top_k.
    assert f"lacks the answers to {3 + NUM_EVAL} of {3 + NUM_EVAL + NUM_TRAIN} sequences" in told
    assert "stillhouse cache build" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"loss": {"top_k": 5}}, "was built with top_k 20 and 24, and loss.top_k is 5"),
        ({"loss": {"top_k": TOP_K, "temperature": 2.0}}, "another loss.temperature"),
    ],
)
def test_another_question_than_the_cache_answers_is_refused(
    built: Path, models: Models, dataset_file: Path, change: dict[str, Any], told: str
) -> None:
    name = f"other-{len(told)}"
    assert told in refused(built, name, spec(models, dataset_file, None, "only", **change))


@pytest.mark.faults(row=16)
def test_another_tokenizer_is_refused(built: Path, models: Models, dataset_file: Path) -> None:
    values = spec(models, dataset_file, None, "only")
    values["student"]["model"] = str(models.foreign)
    assert "tokenizer" in refused(built, "foreign", values)


@pytest.mark.faults(row=6)
def test_another_teacher_than_the_run_began_with_is_refused(
    built: Path, models: Models, dataset_file: Path
) -> None:
    run_dir = make_run(built, "changed", spec(models, dataset_file, None, "only"))
    run_dir.teacher_path.write_text(
        json.dumps({"model_fingerprint": "0" * 64, "adapter": "", "adapter_fingerprint": "", "model": "m"})
    )
    assert finish_here(run_dir) == EXIT_FAILED
    assert "answers of another teacher than the one that this run began with" in failure(run_dir)


@pytest.mark.faults(row=11)
def test_a_damaged_answer_ends_a_run_without_a_teacher_and_is_asked_again_by_one_with(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    run(tmp_path, "build", build_spec(models, dataset_file, hf_teacher.target))
    shard = max((tmp_path / "caches" / "set").glob("*.parquet"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    told = refused(tmp_path, "only", spec(models, dataset_file, None, "only"))
    assert shard.name in told
    assert "CRC" in told

    proxy, counts = counting_proxy(hf_teacher.target)
    with proxy:
        run(tmp_path, "mended", spec(models, dataset_file, proxy.target, "write_through"))
    assert 0 < counts.asked(TOP_K) < NUM_TRAIN
    run(tmp_path, "again", spec(models, dataset_file, None, "only"))


def test_a_teachers_own_texts_are_kept_and_learnt_from_without_it(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    generation = {"max_new_tokens": 8, "samples_per_prompt": 2}
    values = build_spec(models, dataset_file, hf_teacher.target)
    values["contexts"] = [{"teacher": {"generation": generation}}]
    values["data"]["train"][0]["limit"] = 20
    build = run(tmp_path, "build", values)
    total = metric(build, "cache/sequences")
    assert max(total.values()) == 18 + 2  # prompts, and the held-out rows
    reader = CacheReader(tmp_path / "caches" / "set")
    written = [row for shard in reader.shards if shard.meta.top_k == TOP_K for row in reader.rows(shard)]
    assert 18 < len(written) <= 36
    assert all(row.answer.num_rows <= 8 for row in written)

    learnt = spec(models, dataset_file, None, "only", data={"eval_fraction": 0})
    learnt["data"]["train"] = [{"path": "caches/set"}]
    # The held-out rows of the build are in the cache as well, and are not learnt from.
    only = run(tmp_path, "only", learnt)
    assert metric(only, "train/loss")[1] > 0
    again = run(tmp_path, "again", {**values, "cache": {"path": "caches/again"}})
    assert metric(again, "cache/sequences") == total
    assert {row.key for row in written} <= {
        row.key
        for reader in [CacheReader(tmp_path / "caches" / "again")]
        for shard in reader.shards
        for row in reader.rows(shard)
    }


def test_reading_asks_for_what_is_missing_and_keeps_nothing(
    built: Path, models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    longer = tmp_path / "longer.jsonl"
    more = json.dumps({"prompt": "Zoe", "completion": " has eggs."})
    longer.write_text(dataset_file.read_text() + more + "\n")
    before = len(CacheReader(built / "caches" / "set"))
    proxy, counts = counting_proxy(hf_teacher.target)
    with proxy:
        run(built, "reading", spec(models, longer, proxy.target, "read", data={"eval_fraction": 0}))
    # The row that came along and those that were held out, in each of two epochs.
    assert counts.asked(TOP_K) == 2 * (1 + NUM_EVAL)
    assert len(CacheReader(built / "caches" / "set")) == before


def test_a_cache_keeps_the_day_that_its_chat_template_wrote(
    models: Models, hf_teacher: Program, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    allowed = tmp_path_factory.mktemp("allowed")
    student = shutil.copytree(models.student, allowed / "student")
    dated = "{{ strftime_now('%d %b %Y') }}\n"
    (student / "chat_template.jinja").write_text(dated + (student / "chat_template.jinja").read_text())
    turns = [{"role": "user", "content": "Ada has"}, {"role": "assistant", "content": "3 apples."}]
    rows = allowed / "rows.jsonl"
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 3)

    def values(mode: str, target: str | None, **data: Any) -> dict[str, Any]:
        own = {"student": {"model": str(student)}, "optimizer": {"max_steps": 1}, "data": data}
        return spec(models, rows, target, mode, **own)

    run(tmp_path, "build", {**values("write_through", hf_teacher.target, date="2024-07-26"), "task": "cache"})
    with closing(CacheReader(tmp_path / "caches" / "set")) as reader:
        assert [meta.template_date for meta in reader.metas] == ["2024-07-26"] * len(reader.metas)
        text = AutoTokenizer.from_pretrained(student).decode(next(reader.texts(reader.shards[0]))[0])
    assert text.startswith("26 Jul 2024\n")
    host = Host(
        data_dir=tmp_path,
        roots=[allowed],
        slots=DeviceSlots(gpus=[], cpu_slots=1),
        find_dataset=lambda _: None,
        find_webhook_host=str,
        tracker_problem=lambda _: None,
        processor=Processor(),
    )
    asked = from_proto(spec_message(values("only", None)))
    settled = resolve(asked, host).config.data.date
    assert settled == "2024-07-26"
    assert resolve(replace(asked, cache=None), host).config.data.date == datetime.now(UTC).date().isoformat()
    run(tmp_path, "found", values("only", None, date=settled))
    missed = run(tmp_path, "missed", values("only", None, date="2024-07-27"), EXIT_FAILED)
    assert "with the same rows, tokenizer and data section, of which data.date" in failure(missed)
