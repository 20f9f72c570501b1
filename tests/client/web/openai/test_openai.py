"""OpenAI's own client against the web server in front of a real teacher: the teacher's numbers, and its errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer

from stillhouse.client.api import Teacher
from stillhouse.client.web.api.messages import MAX_BODY_BYTES
from stillhouse.client.web.openai.errors import error_body, error_response
from stillhouse.protos.errors import Reason, StillhouseError
from tests.client.web.conftest import start_web
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.programs import Program

openai = pytest.importorskip("openai", reason="openai is not installed")
PROMPT = "Number seven: "


@dataclass(frozen=True, kw_only=True, slots=True)
class Door:
    """The two ways to one teacher."""

    url: str
    model: str
    client: Any
    teacher: Teacher


@pytest.fixture(scope="module")
def door(hf_teacher: Program, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    root = tmp_path_factory.mktemp("openai")
    options = ("--teacher", hf_teacher.target)
    with no_process_left() as mark, start_web(root, "127.0.0.1:1", *options, environment=mark) as web:
        client = openai.OpenAI(base_url=f"{web.target}/v1", api_key="none", max_retries=0, timeout=60)
        with client, Teacher(hf_teacher.target) as teacher:
            yield Door(url=web.target, model=str(models.teacher), client=client, teacher=teacher)


def test_the_models_are_the_teachers(door: Door) -> None:
    assert door.model in [each.id for each in door.client.models.list()]
    assert door.client.models.retrieve(door.model).id == door.model
    with pytest.raises(openai.NotFoundError):
        door.client.models.retrieve("nothing")


def test_a_completion_has_the_teachers_text_and_numbers(door: Door) -> None:
    [theirs] = door.teacher.complete([PROMPT], temperature=0, max_new_tokens=12, top_k_logprobs=5)
    ours = door.client.completions.create(
        model=door.model, prompt=PROMPT, temperature=0, max_tokens=12, logprobs=5
    )
    [choice] = ours.choices
    assert (choice.text, choice.finish_reason) == (theirs.text, theirs.finish)
    assert theirs.distributions is not None
    told = choice.logprobs
    assert told.token_logprobs == pytest.approx(theirs.distributions.target_logprobs.tolist(), abs=1e-6)
    for place, row in enumerate(told.top_logprobs):
        least = theirs.distributions.logprobs[place].min()
        assert max(row.values()) == pytest.approx(theirs.distributions.logprobs[place].max(), abs=1e-6)
        assert min(row.values()) >= least - 1e-6
        assert told.tokens[place] in row
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice.text[offset:].startswith(token)
    assert (ours.usage.prompt_tokens, ours.usage.completion_tokens) == (
        theirs.prompt_tokens,
        len(theirs.token_ids),
    )


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_prompts_are_scored_as_harnesses_ask_for_it(door: Door, max_tokens: int) -> None:
    texts = [PROMPT, "a much longer text, of which nothing is written: ", "é"]
    tokenizer = Tokenizer.from_file(f"{door.model}/tokenizer.json")
    prompts = [tokenizer.encode(each).ids for each in texts]
    scored = {each.id: each.distributions for each in door.teacher.score(enumerate(prompts), top_k=3)}
    by_ids, by_text = (
        door.client.completions.create(
            model=door.model,
            prompt=prompt,
            echo=True,
            max_tokens=max_tokens,
            logprobs=3,
            temperature=0,
            seed=1,
        )
        for prompt in (prompts, texts)
    )
    assert [each.index for each in by_ids.choices] == [0, 1, 2]
    for one, other in zip(by_ids.choices, by_text.choices, strict=True):
        assert (one.text, one.logprobs) == (other.text, other.logprobs)
        ids, rows = prompts[one.index], scored[one.index]
        assert rows is not None
        assert one.text.startswith(texts[one.index])
        numbers = one.logprobs.token_logprobs
        assert numbers[0] is one.logprobs.top_logprobs[0] is None
        assert numbers[1 : len(ids)] == pytest.approx(rows.target_logprobs.tolist(), abs=1e-6)
        assert len(numbers) == len(ids) + max_tokens
        greedy = [
            number == max(top.values())
            for number, top in zip(numbers[1:], one.logprobs.top_logprobs[1:], strict=True)
        ]
        assert greedy[: len(ids) - 1] == (rows.token_ids[:, 0] == ids[1:]).tolist()
    assert by_ids.usage.prompt_tokens == sum(map(len, prompts))


def test_a_chat_streams_what_it_answers_at_once(door: Door) -> None:
    asked = {
        "model": door.model,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Count."}]}],
        "max_completion_tokens": 8,
        "n": 2,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = door.client.chat.completions.create(**asked)
    assert len({each.message.content for each in whole.choices}) == 2
    parts = list(
        door.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert parts[-1].usage == whole.usage
    assert not parts[-1].choices
    pieces = [part.choices[0] for part in parts[:-1]]
    for choice in whole.choices:
        mine = [each for each in pieces if each.index == choice.index]
        assert "".join(each.delta.content for each in mine) == choice.message.content
        assert [each.delta.role for each in mine] == ["assistant", *[None] * (len(mine) - 1)]
        assert [each.finish_reason for each in mine if each.finish_reason] == [choice.finish_reason]
        rows = list(itertools.chain.from_iterable(each.logprobs.content for each in mine))
        assert [each.token for each in rows] == [each.token for each in choice.logprobs.content]
        for one, other in zip(rows, choice.logprobs.content, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert len(one.top_logprobs) == 2
            if not one.token.startswith("bytes:"):
                assert bytes(one.bytes).decode() == one.token


def test_a_stream_ends_with_its_reader_and_a_stop_string_ends_a_text(door: Door) -> None:
    asked = {"model": door.model, "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    stream = door.client.completions.create(**asked, stream=True, echo=True, logprobs=0)
    first = next(stream).choices[0]
    assert first.text.startswith(PROMPT)
    assert first.logprobs.token_logprobs[0] is None
    stream.close()
    text = door.client.completions.create(**asked).choices[0].text
    stop = text[len(text) // 2 :][:3]
    cut = door.client.completions.create(**asked, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")


def test_an_adapter_is_a_model(door: Door, models: Models) -> None:
    path = door.teacher.upload_adapter(models.adapter_a).path
    door.teacher.load_adapter("door/a", path)
    try:
        assert door.client.models.retrieve("door/a").parent == door.model
        [theirs] = door.teacher.complete(
            [PROMPT], adapter="door/a", temperature=0, max_new_tokens=4, top_k_logprobs=1
        )
        asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4, "logprobs": 1}
        ours = door.client.completions.create(model="door/a", **asked).choices[0]
        base = door.client.completions.create(model=door.model, **asked).choices[0]
        assert theirs.distributions is not None
        told = np.array(ours.logprobs.token_logprobs)
        assert told == pytest.approx(theirs.distributions.target_logprobs, abs=1e-6)
        assert base.logprobs.token_logprobs != ours.logprobs.token_logprobs
    finally:
        door.teacher.unload_adapter("door/a")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logprobs": 1_000_000}, "logprobs"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 100_000}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"prompt": ["a", [1]] * 600}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [2**40]}, None),
        ({"prompt": [999_999]}, None),
        ({"prompt": "x " * 5000}, None),
        ({"stop": [1]}, "stop"),
    ],
)
def test_a_wrong_completion_is_refused(door: Door, changes: dict[str, object], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        door.client.completions.create(**{"model": door.model, "prompt": "a", **changes})
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    assert refused.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"tools": [{"type": "function", "function": {"name": "add"}}]},  # which the template does not render
        {"tool_choice": "required"},
        {"top_logprobs": 2},
        {"response_format": {"type": "json_object"}},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_a_wrong_chat_is_refused(door: Door, changes: dict[str, object]) -> None:
    body = {"model": door.model, "messages": [{"role": "user", "content": "a"}], **changes}
    with pytest.raises(openai.BadRequestError, match=r".+\."):
        door.client.chat.completions.create(**body)


def test_other_requests_are_refused_in_the_same_form(door: Door) -> None:
    with pytest.raises(openai.NotFoundError, match="lists them") as unknown:
        door.client.completions.create(model="nothing", prompt="a")
    assert (unknown.value.code, unknown.value.param) == ("MODEL_NOT_FOUND", "model")
    for path, content, status in (
        ("nothing", b"{}", 404),
        ("completions", b"[" * 10_000, 400),
        ("completions", b"[]", 400),
        ("completions", b'{"model": "a", "prompt": "\\ud800"}', 400),
        ("chat/completions", b"{" + b" " * MAX_BODY_BYTES, 413),
    ):
        kind = {"content-type": "application/json"}
        answer = httpx.post(f"{door.url}/v1/{path}", content=content, headers=kind, timeout=60)
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_without_a_folder_batches_name_what_is_missing(door: Door) -> None:
    for call in (door.client.files.list, door.client.batches.list):
        with pytest.raises(openai.BadRequestError, match="--batch-dir"):
            call()


@pytest.mark.parametrize(
    ("reason", "status", "kind"),
    [
        (Reason.CAPABILITY, 400, "invalid_request_error"),
        (Reason.UNAUTHENTICATED, 401, "authentication_error"),
        (Reason.PERMISSION_DENIED, 403, "permission_error"),
        (Reason.ADAPTER_NOT_FOUND, 404, "not_found_error"),
        (Reason.TOO_MANY_CALLS, 429, "rate_limit_error"),
        (Reason.TEACHER_UNREACHABLE, 503, "server_error"),
    ],
)
def test_an_error_of_the_teacher_has_its_status(reason: Reason, status: int, kind: str) -> None:
    error = StillhouseError(reason, "No.", retry_after_s=1.5)
    response = error_response(error)
    assert (response.status_code, response.headers["retry-after"]) == (status, "2")
    assert error_body(error)["error"]["type"] == kind
