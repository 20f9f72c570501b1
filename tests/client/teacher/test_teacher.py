"""Generate, score and the rest against a real teacher: from Python and from the command line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from stillhouse.client.api import Completion, Reason, ScoreAnswer, ScoreItem, StillhouseError, Teacher
from stillhouse.client.cli import cli
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from tests.client.teacher.odd_services import TcpLine, odd_service
from tests.conftest import Models
from tests.support.programs import Program

IDS = [[int(each) for each in np.random.default_rng(seed).integers(0, 384, 12)] for seed in range(40)]


def command(target: str, *arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(cli, ["--teacher", target, *arguments], input=stdin)


def lines(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def by_id(answers: Iterator[ScoreAnswer]) -> dict[object, ScoreAnswer]:
    return {answer.id: answer for answer in answers}


def test_info_names_model_limits_and_capabilities(hf_teacher: Program, models: Models) -> None:
    told = lines(command(hf_teacher.target, "teacher", "info", "--json"))[0]
    assert told["model"] == str(models.teacher)
    assert (told["tokenizer_size"], told["vocab_size"]) == (384, 392)
    assert "LOG_PARTITIONS" in told["capabilities"]  # type: ignore[operator]
    text = command(hf_teacher.target, "teacher", "info").stdout
    assert "vocabulary         384 tokens, 392 with padding" in text


def test_of_several_services_the_first_that_responds_is_used(hf_teacher: Program, tmp_path: Path) -> None:
    both = f"unix:{tmp_path}/nobody, {hf_teacher.target}"
    written = lines(command(both, "generate", "Ada", "--seed", "1", "--max-new-tokens", "4", "--json"))
    alone = lines(
        command(hf_teacher.target, "generate", "Ada", "--seed", "1", "--max-new-tokens", "4", "--json")
    )
    assert written == alone
    twice = command(
        f"{hf_teacher.target},{hf_teacher.target},localhost:{hf_teacher.target.rpartition(':')[2]}",
        "teacher",
        "info",
    )
    assert twice.stdout.count("model fingerprint") == 2
    assert "name one" in command(both, "teacher", "unload-adapter", "x").output


def test_the_tokenizer_arrives(hf_teacher: Program, models: Models, tmp_path: Path) -> None:
    result = command(hf_teacher.target, "teacher", "tokenizer", "--to", str(tmp_path / "tok"), "--json")
    assert str(tmp_path / "tok" / "tokenizer.json") in lines(result)[0]["files"]  # type: ignore[operator]
    sent, own = (tmp_path / "tok/tokenizer.json").read_text(), (models.teacher / "tokenizer.json").read_text()
    assert json.loads(sent)["model"]["vocab"] == json.loads(own)["model"]["vocab"]


@pytest.mark.parametrize("name", ["../x", "/etc/x", ".ssh", ""])
def test_a_teacher_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    def tokenizer(_: object) -> Iterator[teacher_pb2.GetTokenizerResponse]:
        yield teacher_pb2.GetTokenizerResponse(file_name=name, data=b"x")

    with (
        odd_service(GetTokenizer=tokenizer) as target,
        Teacher(target) as teacher,
        pytest.raises(StillhouseError, match="only plain file names"),
    ):
        teacher.save_tokenizer(tmp_path / "tok")
    assert list(tmp_path.iterdir()) == []


def test_streamed_pieces_join_to_the_text_of_one_sample_alone(teacher: Teacher) -> None:
    options: dict[str, Any] = {"seed": 3, "max_new_tokens": 8}
    prompts: list[Any] = ["Ada has 3 apples: ", [5, 6, 7], [{"role": "user", "content": "Hello"}]]
    whole: dict[tuple[int, int], Completion] = {
        (each.prompt_index, each.sample_index): each
        for each in teacher.complete(prompts, num_samples=2, top_k_logprobs=3, **options)
    }
    assert sorted(whole) == list(itertools.product(range(3), range(2)))
    alone = "".join(piece.text for piece in teacher.generate(prompts[:1], **options))
    assert whole[0, 0].text == alone
    first = whole[1, 0]
    assert first.prompt_tokens == 3
    assert first.distributions is not None
    assert first.distributions.start == 3
    assert first.distributions.token_ids.shape == (len(first.token_ids), 3)
    assert first.sampling_logprobs is not None
    assert first.sampling_logprobs.shape == first.token_ids.shape
    assert first.finish in {"stop", "length"}


def test_one_bad_prompt_leaves_the_others(teacher: Teacher) -> None:
    done = {each.prompt_index: each for each in teacher.complete([[5], [999], [6]], max_new_tokens=2)}
    assert [done[index].error is None for index in range(3)] == [True, False, True]
    assert done[1].error is not None
    assert done[1].error.reason is Reason.TOKEN_OUT_OF_RANGE


def test_generate_streams_text_or_prints_samples(hf_teacher: Program) -> None:
    fixed = ("--seed", "1", "--max-new-tokens", "6", "--temperature", "0.5")
    streamed = command(hf_teacher.target, "generate", "Ada has", *fixed)
    piped = command(hf_teacher.target, "generate", *fixed, stdin="Ada has")
    assert streamed.exit_code == 0
    assert streamed.stdout == piped.stdout
    samples = lines(command(hf_teacher.target, "generate", "Ada has", "-n", "3", "--json", *fixed))
    assert {each["sample_index"] for each in samples} == {0, 1, 2}
    first = next(each for each in samples if each["sample_index"] == 0)
    assert f"{first['text']}\n" == streamed.stdout
    several = command(hf_teacher.target, "generate", "Ada", "Ben", "--top-k-logprobs", "2", *fixed).stdout
    assert "--- prompt 1, sample 0" in several
    top: Any = lines(
        command(hf_teacher.target, "generate", "Ada", "--top-k-logprobs", "2", "--json", *fixed)
    )[0]
    assert "".join(top["tokens"]).strip() == top["text"].strip()
    assert [len(each) for each in top["top_tokens"]] == [2] * len(top["token_ids"])
    assert f"{top['token_ids'][0]} {top['tokens'][0]!r}" in several
    assert f"{top['top_token_ids'][0][0]} {top['top_tokens'][0][0]!r}: " in several


def test_generate_takes_conversations(hf_teacher: Program, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    turn = [{"role": "user", "content": "Hello"}]
    file.write_text(json.dumps(turn) + "\n" + json.dumps({"messages": turn}) + "\n")
    fixed = ("--chat", "--json", "--temperature", "0", "--max-new-tokens", "4")
    told = lines(command(hf_teacher.target, "generate", "Hello", "--file", str(file), *fixed))
    assert len(told) == 3
    assert len({str(each["token_ids"]) for each in told}) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1}', 'expects a list of messages, such as [{"role": "user", "content": "Hello"}].'),
        ('[{"role": "user"}]', "chat.json: messages[0].content is missing; it must be a string."),
        (
            '[{"role": "user", "content": "x", "role": "system"}]',
            "chat.json: role is given twice in one object, so that one of its values would be lost. Remove one.",
        ),
        ("[]\n[", "2: this line is not JSON: Expecting value: line 1 column 2 (char 1)."),
    ],
)
def test_bad_conversations_are_named_before_any_request(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "chat.json"
    file.write_text(text if "\n" not in text else '[{"role": "user", "content": "x"}]\n[')
    result = command("127.0.0.1:1", "generate", "--chat", "--file", str(file))
    assert result.exit_code == 2
    assert sentence in result.stderr


@pytest.mark.parametrize(("compact", "nearest"), [(False, 1e-5), (True, 2e-3)])
def test_every_sequence_gets_its_own_result_or_error(teacher: Teacher, compact: bool, nearest: float) -> None:
    items: list[ScoreItem | tuple[str, list[int]]] = [
        ScoreItem(id="a", token_ids=IDS[0], start=4),
        ("b", [5, 999]),
        ("c", []),
    ]
    answers = by_id(teacher.score(items, top_k=5, compact=compact))
    told = answers["a"].distributions
    assert told is not None
    assert (told.start, told.token_ids.shape, told.target_logprobs.shape) == (4, (8, 5), (8,))
    mass = np.exp(told.logprobs).sum(axis=1) + np.exp(told.log_tail)
    np.testing.assert_allclose(mass, 1, atol=nearest)
    errors = [answers[name].error for name in ("b", "c")]
    assert [error and error.reason for error in errors] == [Reason.TOKEN_OUT_OF_RANGE, Reason.EMPTY_SEQUENCE]


def test_sequences_are_read_at_most_the_window_ahead(teacher: Teacher) -> None:
    read = 0

    def sequences() -> Iterator[tuple[int, list[int]]]:
        nonlocal read
        for number, ids in enumerate(IDS):
            read += 1
            yield number, ids

    ahead = [read - answered for answered, _ in enumerate(teacher.score(sequences(), max_inflight=3))]
    assert len(ahead) == len(IDS)
    assert max(ahead) <= 3 + 2  # one in the reader's hand, one taken off while it is counted


def test_an_error_of_the_callers_iterable_is_raised_after_the_results(teacher: Teacher) -> None:
    def sequences() -> Iterator[tuple[int, list[int]]]:
        yield 0, IDS[0]
        raise OSError("disk gone")

    answers = teacher.score(sequences())
    assert next(answers).id == 0
    with pytest.raises(OSError, match="disk gone"):
        next(answers)


@pytest.mark.faults(row=1)
def test_a_lost_stream_is_opened_again_and_every_sequence_scored_once(
    hf_teacher: Program, teacher: Teacher
) -> None:
    undisturbed = by_id(teacher.score(enumerate(IDS), top_k=4))
    lost: list[StillhouseError] = []
    seen: list[ScoreAnswer] = []
    with TcpLine(hf_teacher.target) as line, Teacher(line.target) as through:
        for answer in through.score(
            enumerate(IDS), top_k=4, max_inflight=5, on_lost=lambda error, _: lost.append(error)
        ):
            seen.append(answer)
            if len(seen) in {3, 17}:
                line.cut()
    assert sorted(int(str(answer.id)) for answer in seen) == list(range(len(IDS)))
    assert lost
    for answer in seen:
        expected = undisturbed[answer.id].distributions
        assert answer.distributions is not None
        assert expected is not None
        np.testing.assert_array_equal(answer.distributions.logprobs, expected.logprobs)


def test_leaving_early_ends_the_stream(teacher: Teacher) -> None:
    answers = teacher.score((number, IDS[0]) for number in itertools.count())
    assert next(answers).error is None
    answers.close()  # type: ignore[attr-defined]
    assert len(list(teacher.score(enumerate(IDS[:2])))) == 2


def test_score_reads_json_lines_and_writes_text_json_and_npz(hf_teacher: Program, tmp_path: Path) -> None:
    file = tmp_path / "ids.jsonl"
    file.write_text(
        json.dumps({"id": "x", "token_ids": IDS[0], "start": 4}) + "\n\n"
        + json.dumps({"token_ids": [5, 999]}) + "\n"
    )  # fmt: skip
    out = tmp_path / "out.npz"
    arguments = ("score", "--ids", str(file), "--top-k", "3", "--entropy", "--out", str(out))
    result = command(hf_teacher.target, *arguments, "--json")
    assert result.exit_code == 1
    told = {each["id"]: each for each in lines(result)}
    assert told[3]["error"]["reason"] == "TOKEN_OUT_OF_RANGE"  # type: ignore[index]
    first = told["x"]
    logprobs = np.array(first["target_logprobs"])
    assert (first["start"], first["num_tokens"]) == (4, 8)
    assert first["logprob"] == pytest.approx(logprobs.sum())
    assert first["perplexity"] == pytest.approx(np.exp(-logprobs.mean()))
    with np.load(out) as file_of_arrays:
        arrays = dict(file_of_arrays)
    assert (arrays["ids"].tolist(), arrays["offsets"].tolist()) == (["x"], [0, 8])
    assert arrays["start"].tolist() == [4]
    np.testing.assert_array_equal(arrays["logprobs"], np.array(first["top_logprobs"], dtype=np.float32))
    assert arrays["entropy"].shape == (8,)
    assert arrays["error_ids"].tolist() == ["3"]
    piped = command(hf_teacher.target, "score", stdin=file.read_text().splitlines()[0])
    assert piped.exit_code == 0
    assert piped.stdout.startswith("x  tokens 8  logprob -")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", ":2: this line is not JSON"),
        ('{"token_ids": [1], "token_ids": [2]}', ":2: token_ids is given twice in one object"),
        ('{"token_ids": [true]}', ":2: token_ids expects whole numbers in [0, 2^31)."),
        (
            '{"token_ids": [1], "strt": 1}',
            ':2: there is no field "strt"; the fields are id, token_ids, start',
        ),
        ('{"token_ids": [1], "start": "1"}', ":2: start expects a whole number of at least 1, not '1'."),
        ('{"ids": [1]}', ':2: expects an object such as {"id": 1, "token_ids": [5, 9], "start": 1}.'),
    ],
)
def test_a_bad_line_is_named_after_the_results_before_it(
    hf_teacher: Program, tmp_path: Path, line: str, sentence: str
) -> None:
    file = tmp_path / "ids.jsonl"
    file.write_text('{"token_ids": [5, 6]}\n' + line + "\n")
    result = command(hf_teacher.target, "score", "--ids", str(file))
    assert result.exit_code == 2
    assert result.stdout.startswith("1  tokens 1  ")
    assert sentence in result.stderr


def test_adapters_are_loaded_used_and_unloaded(hf_teacher: Program, models: Models) -> None:
    target, name = hf_teacher.target, "client-test/1"
    assert command(target, "teacher", "load-adapter", name, str(models.adapter_a)).exit_code == 0
    try:
        ids = json.dumps({"id": 0, "token_ids": IDS[0]})
        base = lines(command(target, "score", "--json", stdin=ids))[0]
        adapted = lines(command(target, "score", "--json", "--adapter", name, stdin=ids))[0]
        assert base["logprob"] != adapted["logprob"]
    finally:
        assert command(target, "teacher", "unload-adapter", name).exit_code == 0
    again = command(target, "teacher", "unload-adapter", name, "--json")
    assert again.exit_code == 4
    assert json.loads(again.stderr)["error"]["reason"] == "ADAPTER_NOT_FOUND"


def test_an_adapter_is_uploaded_loaded_listed_and_unloaded(hf_teacher: Program, models: Models) -> None:
    target, name = hf_teacher.target, "client-upload/1"
    result = command(target, "teacher", "upload-adapter", str(models.adapter_a), "--load", name)
    assert result.exit_code == 0
    assert f"is loaded as {name}" in result.stdout
    try:
        listed = command(target, "teacher", "adapters")
        assert f"{name}  " in listed.stdout
        assert "1 of 8 slots in use" in listed.stdout
        assert json.loads(command(target, "teacher", "adapters", "--json").stdout)["max_adapters"] == 8
    finally:
        assert command(target, "teacher", "unload-adapter", name).exit_code == 0
    result = command(target, "teacher", "upload-adapter", "absent")
    assert result.exit_code == 2
    assert "cannot read absent/adapter_config.json: No such file or directory." in result.stderr


def test_limits_are_reported_with_the_remedy(hf_teacher: Program) -> None:
    result = command(hf_teacher.target, "score", "--top-k", "999", stdin='{"token_ids": [5, 6]}')
    assert result.exit_code == 2
    assert "999" in result.stderr
    assert "256" in result.stderr
