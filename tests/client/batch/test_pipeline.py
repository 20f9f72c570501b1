"""Batch inference from file to file against a real teacher: formats, order, failures, and what a batch refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stillhouse.client.api import (
    BatchProgress,
    BatchSettings,
    Listeners,
    Reason,
    Sampling,
    StillhouseError,
    Teacher,
    generate_file,
)
from stillhouse.protos.cache.reader import CacheReader
from stillhouse.student_trainer.train.data.cached_texts import cached_examples
from tests.client.batch.batches import alone, command, read, write
from tests.conftest import Models
from tests.support.programs import Program

FIXED = Sampling(seed=5, max_new_tokens=6)


def test_each_row_is_completed_in_order_with_its_own_settings(
    teacher: Teacher, adapted: str, tmp_path: Path
) -> None:
    turn = [{"role": "user", "content": "Hello"}]
    free = alone(teacher, "Ben", max_new_tokens=30).text
    stop = free[3:5]
    source = write(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": "Ada has", "label": {"x": [1]}},
        {"messages": turn, "num_samples": 2, "temperature": 0.5},
        "",
        {"id": 3, "token_ids": [5, 6, 7], "max_new_tokens": 3, "top_k": 2, "top_p": 0.9},
        {"id": 4, "prompt": "Ada has", "adapter": adapted},
        {"id": 5, "prompt": "Ben", "stop": stop, "max_new_tokens": 30, "seed": 5},
    )
    summary = generate_file(teacher, source, tmp_path / "out.jsonl", BatchSettings(sampling=FIXED))
    rows = read(tmp_path / "out.jsonl")
    assert (summary.rows, summary.failed, summary.asked, summary.format) == (5, 0, 5, "plain")
    assert [row["id"] for row in rows] == ["a", 2, 3, 4, 5]
    assert rows[0]["label"] == {"x": [1]}
    texts = [[each["text"] for each in row["completions"]] for row in rows]
    assert texts[0] == [alone(teacher, "Ada has").text]
    both = {
        each.sample_index: each.text
        for each in teacher.complete([turn], num_samples=2, temperature=0.5, seed=5, max_new_tokens=6)
    }
    assert texts[1] == [both[0], both[1]]
    short = alone(teacher, [5, 6, 7], max_new_tokens=3, top_k=2, top_p=0.9)
    assert rows[2]["completions"][0]["token_ids"] == short.token_ids.tolist()
    assert rows[2]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert texts[3] == [alone(teacher, "Ada has", adapter=adapted).text] != texts[0]
    assert (texts[4], rows[4]["completions"][0]["finish_reason"]) == ([free[: free.index(stop)]], "stop")


def test_failures_stay_in_their_rows_and_are_retried(
    hf_teacher: Program, models: Models, teacher: Teacher, tmp_path: Path
) -> None:
    source = write(
        tmp_path / "in.jsonl",
        {"id": 1, "prompt": "Ada"},
        {"id": 2, "prompt": "Ada", "adapter": "batch-test/late"},
        "{no json",
        {"id": 4, "prompt": ["Ada"]},
        {"id": 5, "prompt": "Ada", "messages": []},
        {"id": 6, "token_ids": [999]},
        {"id": 7, "messages": [{"role": "user"}]},
        {"id": 8, "prompt": "Ada", "temperature": "hot"},
        {"id": 9, "prompt": "Ada", "top_p": 2},
        {"id": 10, "prompt": "\ud800"},
        {"id": 11, "prompt": "Ben"},
    )
    out = tmp_path / "out.jsonl"
    arguments = ("--in", source, "--out", out, "--seed", 5, "--max-new-tokens", 6, "--json")
    first = command(hf_teacher.target, *arguments)
    assert first.exit_code == 1
    told = json.loads(first.stdout)
    assert {key: told[key] for key in ("rows", "failed", "asked")} == {"rows": 11, "failed": 9, "asked": 11}
    errors = {row["id"]: row.get("error", {"message": ""})["message"] for row in read(out)}
    wanted = {
        1: "",
        2: "There is no adapter 'batch-test/late'",
        None: "Line 3 is not JSON",
        4: "prompt is an array; it must be a string, or an array of messages.",
        5: "Line 5: a row has one of prompt, messages, token_ids; this one has prompt and messages.",
        6: "token_ids[0] is 999",
        7: "messages[0].content is missing; it must be a string.",
        8: 'temperature is the string "hot"; it must be a number.',
        9: "top_p is 2.0.",
        10: "prompt has \\ud800 without its other half",
        11: "",
    }
    assert errors.keys() == wanted.keys()
    for name, sentence in wanted.items():
        assert errors[name].startswith(sentence)
    before = out.read_text().splitlines()
    teacher.load_adapter("batch-test/late", str(models.adapter_b))
    try:
        again = command(hf_teacher.target, *arguments, "--retry-failed")
    finally:
        teacher.unload_adapter("batch-test/late")
    told = json.loads(again.stdout)
    assert {key: told[key] for key in ("rows", "failed", "asked")} == {"rows": 11, "failed": 8, "asked": 9}
    after = out.read_text().splitlines()
    assert [index for index, line in enumerate(after) if line != before[index]] == [1]
    assert json.loads(after[1])["completions"][0]["text"]
    assert {each.name for each in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.journal"}


def test_a_data_set_has_a_row_for_each_sample_and_failures_beside_it(
    teacher: Teacher, tmp_path: Path
) -> None:
    turn = {"role": "user", "content": "Hello"}
    source = write(
        tmp_path / "in.jsonl",
        {"id": 1, "prompt": "Ada has", "label": 3, "num_samples": 2},
        {"id": 2, "token_ids": [5]},
        {"id": 3, "prompt": "x", "adapter": "nobody"},
        {"id": 4, "messages": [turn], "temperature": 0},
    )
    out = tmp_path / "out.jsonl"
    settings = BatchSettings(sampling=FIXED, as_dataset=True)
    summary = generate_file(teacher, source, out, settings)
    assert (summary.rows, summary.failed, summary.failed_file) == (4, 2, tmp_path / "out.jsonl.failed")
    rows = read(out)
    assert [row["id"] for row in rows] == [1, 1, 4]
    assert rows[0] == {
        "id": 1,
        "label": 3,
        "prompt": "Ada has",
        "completion": alone(teacher, "Ada has").text,
        "finish_reason": "length",
    }
    answer = alone(teacher, [turn], temperature=0).text
    assert rows[2]["messages"] == [turn, {"role": "assistant", "content": answer}]
    assert [(row["id"], row["line"]) for row in read(tmp_path / "out.jsonl.failed")] == [(2, 2), (3, 3)]
    before = out.read_bytes()
    again = generate_file(
        teacher, source, out, BatchSettings(sampling=FIXED, as_dataset=True, retry_failed=True)
    )
    assert (again.asked, again.failed, out.read_bytes()) == (2, 2, before)
    assert [row["id"] for row in read(tmp_path / "out.jsonl.failed")] == [2, 3]


def test_a_run_reads_the_rows_of_a_data_set(teacher: Teacher, models: Models, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from stillhouse.student_trainer.config.schema import DatasetConfig
    from stillhouse.student_trainer.train.data.encoding import RowEncoder
    from stillhouse.student_trainer.train.data.readers import read_rows

    turn = {"role": "user", "content": "Hello"}
    encoder = RowEncoder(AutoTokenizer.from_pretrained(models.teacher), completion_only=True)
    for kind, given in (("completion", {"prompt": "Ada has"}), ("messages", {"messages": [turn]})):
        source, out = write(tmp_path / f"{kind}-in.jsonl", given), tmp_path / f"{kind}.jsonl"
        generate_file(teacher, source, out, BatchSettings(sampling=FIXED, as_dataset=True))
        [row] = read_rows(DatasetConfig(path=str(out)), tmp_path)
        assert row.parse().kind == kind
        assert any(encoder.encode(row)[1])


def test_fields_that_change_what_a_row_means_are_honoured_or_refused(
    teacher: Teacher, tmp_path: Path
) -> None:
    system, turn = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    source = write(
        tmp_path / "in.jsonl",
        {"id": 1, "prompt": "Hello", "system": "Be brief."},
        {"id": 2, "prompt": [system, turn]},
        {"id": 3, "messages": [turn], "system": "Be brief.", "max_tokens": 3, "n": 2},
        {"id": 4, "messages": [turn], "tools": [tool]},
        {"id": 5, "messages": [turn, called, {"role": "tool", "content": "x"}]},
        {"id": 6, "token_ids": [5], "system": "Be brief."},
        {"id": 7, "messages": [turn], "max_tokens": 3, "max_new_tokens": 4},
        {"id": 8, "prompt": "Hello", "n": 0},
        {"id": 9, "prompt": "Hello", "logit_bias": {"5": 1}},
        {"id": 10, "prompt": "Hello", "chat_template_kwargs": {"enable_thinking": False}},
        {"id": 11, "prompt": "Hello", "label": "kept"},
    )
    generate_file(teacher, source, tmp_path / "rows.jsonl", BatchSettings(sampling=FIXED))
    rows = {row["id"]: row for row in read(tmp_path / "rows.jsonl")}
    asked = alone(teacher, [system, turn])
    assert [rows[number]["completions"][0]["text"] for number in (1, 2)] == [asked.text] * 2
    assert rows[1]["usage"]["prompt_tokens"] == asked.prompt_tokens
    assert [len(rows[3]["completions"]), rows[3]["usage"]["completion_tokens"]] == [2, 6]
    assert asked.text.startswith(rows[3]["completions"][0]["text"])
    told = {number: row["error"]["message"] for number, row in rows.items() if "error" in row}
    wanted = {
        4: "tools leaves no trace in the text: the chat template does not render it.",
        5: "messages[1].tool_calls leaves no trace in the text",
        6: "system has no effect on token ids.",
        7: "max_tokens differs from max_new_tokens.",
        8: "n is 0; it must be a whole number in [1, 4096].",
        9: "logit_bias is not supported, and would change what the row means.",
        10: "chat_template_kwargs.enable_thinking is not read by the chat template.",
    }
    assert told.keys() == wanted.keys()
    assert all(told[number].startswith(sentence) for number, sentence in wanted.items())
    assert rows[11]["label"] == "kept"

    source = write(
        tmp_path / "in.jsonl",
        {"id": 1, "prompt": "Hello", "system": "Be brief."},
        {"id": 2, "prompt": [turn], "max_tokens": 3},
        {"id": 3, "prompt": "Hello", "lable": "typed wrongly"},
        {"id": 4, "messages": [{**turn, "mood": "mild"}]},
    )
    settings = BatchSettings(sampling=FIXED, as_dataset=True, chat=True, extra_fields="refuse")
    generate_file(teacher, source, tmp_path / "data.jsonl", settings)
    first, second = read(tmp_path / "data.jsonl")
    answer = {"role": "assistant", "content": asked.text}
    assert (first["system"], first["messages"]) == ("Be brief.", [turn, answer])
    answer = {"role": "assistant", "content": alone(teacher, [turn], max_new_tokens=3).text}
    assert (second["prompt"], second["completion"]) == ([turn], [answer])
    refused = [row["error"]["message"].split(".")[0] for row in read(tmp_path / "data.jsonl.failed")]
    assert refused == ["lable is no field of a row", "messages[0]"]


def test_distributions_of_a_batch_are_captured(teacher: Teacher, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "Ada has", "num_samples": 2}, {"token_ids": [5, 6]})
    settings = BatchSettings(sampling=FIXED, capture=tmp_path / "cache", top_k=4)
    generate_file(teacher, source, tmp_path / "out.jsonl", settings)
    cache = CacheReader(tmp_path / "cache")
    kept = [row for shard in cache.shards for row in cache.rows(shard)]
    cache.close()
    assert len(kept) == 3
    ids = next(row for row in kept if row.token_ids[:2].tolist() == [5, 6])
    assert ids.token_ids[2:].tolist() == read(tmp_path / "out.jsonl")[1]["completions"][0]["token_ids"]
    scored = next(teacher.score([(0, ids.token_ids)], top_k=4)).distributions
    assert scored is not None
    np.testing.assert_allclose(ids.answer.target_logprobs, scored.target_logprobs[1:], atol=1e-4)
    np.testing.assert_array_equal(ids.answer.token_ids, scored.token_ids[1:])


def test_a_student_with_a_prompt_of_its_own_never_reads_the_teachers(
    models: Models, teacher: Teacher, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    secret, question = "Zanzibar 4711", {"role": "user", "content": "Hello"}
    other = {"role": "user", "content": "Hello again"}
    source = write(
        tmp_path / "in.jsonl",
        {"id": 1, "messages": [question], "system": secret, "student_prompt": "Hello"},
        {"id": 2, "prompt": f"{secret} Ada has", "student_prompt": "Ada has"},
        {"id": 3, "prompt": [other], "system": secret, "student_prompt": [other]},
        {"id": 4, "prompt": "Ada has", "student_prompt": 7},
    )
    settings = BatchSettings(sampling=FIXED, as_dataset=True, capture=tmp_path / "cache", top_k=4)
    generate_file(teacher, source, tmp_path / "data.jsonl", settings)
    rows = read(tmp_path / "data.jsonl")
    described = {"id", "finish_reason", "completion", "num_tokens", "mean_logprob"}
    assert [list(row.keys() - described) for row in rows] == [["messages"], ["prompt"], ["prompt"]]
    assert secret not in (tmp_path / "data.jsonl").read_text()
    assert "student_prompt is the number 7" in (tmp_path / "data.jsonl.failed").read_text()

    tokenizer = AutoTokenizer.from_pretrained(models.teacher)
    examples = list(cached_examples(tmp_path / "cache", teacher.info().tokenizer_fingerprint, routed=False))
    assert len(examples) == 3
    for example in examples:
        assert secret not in tokenizer.decode(example.token_ids)
        assert secret in tokenizer.decode(example.prompt_for(""))


def test_a_batch_resumes_only_with_the_settings_it_started_with(teacher: Teacher, tmp_path: Path) -> None:
    rows = [{"id": index, "prompt": f"Ada {index}"} for index in range(3)]
    source, out = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    generate_file(teacher, source, out, BatchSettings(sampling=FIXED))
    whole = out.read_bytes()

    def refused(settings: BatchSettings) -> str:
        with pytest.raises(StillhouseError) as caught:
            generate_file(teacher, source, out, settings)
        assert caught.value.reason is Reason.REQUEST_CONFLICT
        assert out.read_bytes() == whole
        return caught.value.message

    other = BatchSettings(sampling=Sampling(seed=5, max_new_tokens=7))
    assert "was started with max_new_tokens 6, and this command has 7." in refused(other)
    assert "output 'plain', and this command has 'dataset'" in refused(
        BatchSettings(sampling=FIXED, as_dataset=True)
    )
    write(source, *rows[:2], {"id": 2, "prompt": "other"})
    assert "one of the first 3 rows has changed" in refused(BatchSettings(sampling=FIXED))
    write(source, *rows[:2])
    assert "it has 2 rows, and 3 were completed" in refused(BatchSettings(sampling=FIXED))
    write(source, *rows, {"id": 3, "prompt": "Ada 3"})
    more = generate_file(teacher, source, out, BatchSettings(sampling=FIXED))
    assert (more.rows, more.asked) == (4, 1)
    assert out.read_bytes().startswith(whole)
    (tmp_path / "out.jsonl.journal").unlink()
    whole = out.read_bytes()
    assert "cannot be resumed as a batch" in refused(BatchSettings(sampling=FIXED))
    new = generate_file(teacher, source, out, BatchSettings(sampling=FIXED, overwrite=True))
    assert (new.asked, out.read_bytes()) == (4, whole)


def test_a_retry_that_was_killed_while_replacing_the_output_completes_later(
    teacher: Teacher, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": 1, "prompt": "Ada"}, {"id": 2, "prompt": "Ada", "adapter": "batch-test/later"}]
    source, out = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    settings = BatchSettings(sampling=FIXED, retry_failed=True)
    assert generate_file(teacher, source, out, settings).failed == 1
    teacher.load_adapter("batch-test/later", str(models.adapter_b))
    try:
        with monkeypatch.context() as patched:
            patched.setattr("stillhouse.client.batch.pipeline.commit_retry", lambda _: None)
            assert generate_file(teacher, source, out, settings).failed == 0
        (tmp_path / "out.jsonl.retry").replace(out)  # as far as the kill let it
        summary = generate_file(teacher, source, out, BatchSettings(sampling=FIXED))
    finally:
        teacher.unload_adapter("batch-test/later")
    assert (summary.asked, summary.failed) == (0, 0)
    assert [row["id"] for row in read(out)] == [1, 2]
    assert {each.name for each in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.journal"}


def test_another_teacher_does_not_resume_a_batch(teacher: Teacher, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", {"prompt": "Ada"}), tmp_path / "out.jsonl"
    generate_file(teacher, source, out)
    journal = tmp_path / "out.jsonl.journal"
    journal.write_text(journal.read_text().replace(teacher.limits.model_fingerprint, "0" * 64))
    with pytest.raises(StillhouseError, match="with another model_fingerprint") as caught:
        generate_file(teacher, source, out)
    assert caught.value.reason is Reason.TEACHER_CHANGED


def test_progress_counts_completed_rows_and_not_rows_that_were_read(teacher: Teacher, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *({"prompt": name} for name in ("Ada", "Ben", "Cleo")), "")
    told: list[BatchProgress] = []
    generate_file(
        teacher,
        source,
        tmp_path / "out.jsonl",
        BatchSettings(sampling=FIXED),
        Listeners(progress=told.append),
    )
    assert [(each.rows, each.total_rows) for each in told] == [(1, 3), (2, 3), (3, 3)]


def test_one_process_at_a_time(teacher: Teacher, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "Ada"}, {"prompt": "Ben"})
    second: list[StillhouseError] = []

    def progress(_: BatchProgress) -> None:
        with pytest.raises(StillhouseError, match="Another process writes") as caught:
            generate_file(teacher, source, tmp_path / "out.jsonl")
        second.append(caught.value)

    summary = generate_file(
        teacher, source, tmp_path / "out.jsonl", BatchSettings(sampling=FIXED), Listeners(progress=progress)
    )
    assert (summary.rows, len(second)) == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--out", "x"), "need --in FILE"),
        (("--in", "x"), "--in FILE needs --out FILE"),
        (("Hello", "--in", "x", "--out", "y"), "excludes PROMPT"),
        (("--in", "absent", "--out", "y"), "absent is not a file."),
        (("--in", "x", "--out", "y", "--top-k-logprobs", "3"), "--top-k-logprobs needs --capture DIR"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: tuple[str, ...], sentence: str) -> None:
    result = command("127.0.0.1:1", *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
