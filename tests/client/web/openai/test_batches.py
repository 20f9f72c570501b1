"""Files and batches with OpenAI's own client: the rows of `stillhouse generate`, across kills of the server, each to its owner."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse.client.api import Teacher
from stillhouse.client.batch.pipeline import BatchSettings, generate_file
from stillhouse.client.web.openai.batches import folder as batch_folder
from stillhouse.client.web.openai.batches.folder import BatchFolder
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rpc.tokens import Scope, create
from tests.client.web.conftest import start_web
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher

openai = pytest.importorskip("openai", reason="openai is not installed")
PATIENCE_S = 120.0
ROWS = 24
KEY = "the-key-of-ada"


@dataclass(frozen=True, kw_only=True, slots=True)
class Door:
    """A web server with a folder, and OpenAI's client of it."""

    web: Program
    client: Any
    teacher: str
    model: str
    folder: Path

    def rows(self, number: int = ROWS, **changes: Any) -> list[dict[str, Any]]:
        """Requests whose texts differ."""
        return [
            {
                "custom_id": f"row-{each}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {
                    "model": self.model,
                    "prompt": f"Number {each}: ",
                    "max_tokens": 8,
                    "seed": each,
                    "logprobs": 2 if each % 5 == 0 else None,
                    **changes,
                },
            }
            for each in range(number)
        ]

    def upload(self, rows: list[dict[str, Any]] | bytes) -> Any:
        content = (
            rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
        )
        return self.client.files.create(file=("in.jsonl", content), purpose="batch")

    def create(
        self, rows: list[dict[str, Any]] | bytes, endpoint: str = "/v1/completions", **fields: Any
    ) -> Any:
        return self.client.batches.create(
            input_file_id=self.upload(rows).id, endpoint=endpoint, completion_window="24h", **fields
        )

    def ended(self, batch: Any) -> Any:
        """The batch once it has ended."""
        deadline_s = time.monotonic() + PATIENCE_S
        while batch.status not in ("completed", "failed", "cancelled", "expired"):
            assert time.monotonic() < deadline_s, (batch, self.web.log())
            time.sleep(0.1)
            batch = self.client.batches.retrieve(batch.id)
        return batch

    def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.client.files.content(file_id).text.splitlines()]


Start = Callable[[Path], Door]
"""Starts a server on a folder; an earlier one on it must have ended."""


@pytest.fixture(scope="module")
def start(hf_teacher: Program, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    started: list[Program] = []
    with no_process_left() as mark:

        def start_on(folder: Path) -> Door:
            root = tmp_path_factory.mktemp("web")
            options = (
                "--teacher",
                hf_teacher.target,
                "--batch-dir",
                str(folder),
                "--batch-max-bytes",
                "5000000",
            )
            web = start_web(root, "127.0.0.1:1", *options, environment=mark)
            started.append(web)
            client = openai.OpenAI(base_url=f"{web.target}/v1", api_key=KEY, max_retries=0, timeout=60)
            model = str(models.teacher)
            return Door(web=web, client=client, teacher=hf_teacher.target, model=model, folder=folder)

        try:
            yield start_on
        finally:
            for each in started:
                each.stop()


@pytest.fixture(scope="module")
def door(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Door:
    return start(tmp_path_factory.mktemp("batches") / "kept")


def generated(door: Door, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The output of `stillhouse generate` for the same rows."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Teacher(door.teacher) as teacher:
        generate_file(teacher, source, folder / "out.jsonl", BatchSettings(format="openai"))
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    body = {name: value for name, value in row["response"]["body"].items() if name != "created"}
    return {**row, "response": {**row["response"], "body": body}}


def test_a_batch_has_the_rows_of_generate(door: Door, tmp_path: Path) -> None:
    rows = door.rows()
    rows[3]["body"]["max_tokens"] = -1
    rows[7]["body"]["nothing"] = 1
    batch = door.create(rows, metadata={"team": "a"})
    assert (batch.object, batch.endpoint, batch.metadata) == ("batch", "/v1/completions", {"team": "a"})
    batch = door.ended(batch)
    assert (batch.status, batch.errors) == ("completed", None)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (ROWS, ROWS - 2, 2)
    theirs = [without_times(each) for each in generated(door, rows, tmp_path)]
    output, errors = door.lines(batch.output_file_id), door.lines(batch.error_file_id)
    assert [without_times(each) for each in output] == [each for each in theirs if each["error"] is None]
    assert [each["custom_id"] for each in errors] == ["row-3", "row-7"]
    assert {each["response"]["status_code"] for each in errors} == {400}
    assert door.client.batches.list(limit=1).data[0].id == batch.id
    kept = {each.id: each for each in door.client.files.list()}
    assert kept[batch.output_file_id].purpose == "batch_output"
    assert kept[batch.input_file_id].filename == "in.jsonl"
    door.client.files.delete(batch.input_file_id)
    with pytest.raises(openai.NotFoundError):
        door.client.files.retrieve(batch.input_file_id)
    # The server's parser of uploads leaves nothing behind, nor does the batch.
    assert list((door.folder / "uploads").iterdir()) == []
    assert [each.name for each in (door.folder / "batches" / batch.id).iterdir()] == ["batch.json"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_thousand_rows_equal_those_of_generate(door: Door, tmp_path: Path) -> None:
    rows = door.rows(1000)
    theirs = [without_times(each) for each in generated(door, rows, tmp_path)]
    batch = door.ended(door.create(rows))
    assert [without_times(each) for each in door.lines(batch.output_file_id)] == theirs
    assert (batch.request_counts.completed, batch.error_file_id) == (1000, None)


def begun(door: Door, batch: Any) -> Any:
    """The batch once some of its rows are done, and not all."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not batch.request_counts.completed:
        assert time.monotonic() < deadline_s, (batch, door.web.log())
        time.sleep(0.05)
        batch = door.client.batches.retrieve(batch.id)
    assert batch.status == "in_progress"
    return batch


def long_rows(door: Door) -> list[dict[str, Any]]:
    return door.rows(300, max_tokens=48)


def test_a_batch_goes_on_after_a_kill_of_the_server_once_its_owner_comes(
    start: Start, tmp_path: Path
) -> None:
    first = start(tmp_path / "kept")
    rows = long_rows(first)
    batch = begun(first, first.create(rows))
    first.web.process.send_signal(signal.SIGKILL)  # its workers end with it
    first.web.process.wait()
    second = start(tmp_path / "kept")
    record = json.loads((second.folder / "batches" / batch.id / "batch.json").read_text())
    assert record["status"] == "in_progress"  # nobody has come whose token it could use
    assert KEY not in json.dumps(record)
    batch = second.ended(second.client.batches.retrieve(batch.id))
    assert (batch.status, batch.request_counts.completed) == ("completed", len(rows))
    theirs = [without_times(each) for each in generated(second, rows, tmp_path)]
    assert [without_times(each) for each in second.lines(batch.output_file_id)] == theirs


def test_a_cancelled_batch_keeps_what_is_done(door: Door, tmp_path: Path) -> None:
    rows = long_rows(door)
    batch = begun(door, door.create(rows))
    with pytest.raises(openai.ConflictError, match="cancel it"):
        door.client.files.delete(batch.input_file_id)
    assert door.client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = door.ended(batch)
    assert batch.status == "cancelled"
    done = {each["custom_id"]: without_times(each) for each in door.lines(batch.output_file_id)}
    assert 0 < len(done) == batch.request_counts.completed < len(rows)
    wanted = [each for each in rows if each["custom_id"] in done]
    assert len(wanted) == len(done)
    for own, other in zip(done.values(), generated(door, wanted, tmp_path), strict=True):
        assert own["response"]["body"]["choices"] == other["response"]["body"]["choices"]
    with pytest.raises(openai.ConflictError):
        door.client.batches.cancel(batch.id)


def test_an_input_that_cannot_be_worked_on_fails_as_a_whole(door: Door) -> None:
    rows = door.rows(6)
    rows[1]["custom_id"] = "row-0"
    rows[2]["url"] = "/v1/chat/completions"
    rows[3]["body"]["model"] = "another"
    rows[4]["body"] = []
    del rows[5]["custom_id"]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + "{\n"
    batch = door.ended(door.create(lines.encode()))
    assert (batch.status, batch.output_file_id, batch.request_counts.completed) == ("failed", None, 0)
    assert [(each.line, each.code) for each in batch.errors.data] == [
        (2, "duplicate_custom_id"),
        (3, "mismatched_endpoint"),
        (4, "mismatched_model"),
        (5, "invalid_body"),
        (6, "invalid_custom_id"),
        (7, "invalid_json_line"),
    ]
    for rows_of in (door.rows(1, model="nobody"), []):
        batch = door.ended(door.create(rows_of))
        assert batch.status == "failed"
    assert batch.errors.data[0].code == "empty_file"


def test_files_and_batches_are_their_owners_alone(door: Door) -> None:
    batch = door.create(door.rows(1))
    other = openai.OpenAI(base_url=door.client.base_url, api_key="eve", max_retries=0)
    with other:
        for call in (
            lambda: other.files.retrieve(batch.input_file_id),
            lambda: other.files.content(batch.input_file_id),
            lambda: other.files.delete(batch.input_file_id),
            lambda: other.batches.retrieve(batch.id),
            lambda: other.batches.cancel(batch.id),
            lambda: other.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/completions", completion_window="24h"
            ),
            lambda: other.files.retrieve("file-../../key"),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        assert list(other.files.list()) == list(other.batches.list()) == []
    assert door.ended(batch).status == "completed"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "forever"}, "completion_window"),
        ({"completion_window": "999d"}, "completion_window"),
        ({"metadata": {"a": "x" * 600}}, "metadata"),
        ({"extra_body": {"nothing": 1}}, "nothing"),
    ],
)
def test_a_wrong_batch_is_refused(door: Door, changes: dict[str, Any], param: str) -> None:
    file = door.upload(door.rows(1))
    asked = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h", **changes}
    with pytest.raises(openai.BadRequestError) as refused:
        door.client.batches.create(**asked)
    assert refused.value.param == param


FORM = b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
PURPOSE = FORM % (b"purpose", b"", b"batch")
FILE = FORM % (b"file", b'; filename="a"', b"{}")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (PURPOSE + FILE + b"--x--\r\n", 200),
        (PURPOSE + b"--x--\r\n", 400),
        (FILE + b"--x--\r\n", 400),
        (FILE + FILE + PURPOSE + b"--x--\r\n", 400),
        (PURPOSE + PURPOSE + FILE + b"--x--\r\n", 400),
        (FORM % (b"purpose", b"", b"fine-tune") + FILE + b"--x--\r\n", 400),
        (FORM % (b"nothing", b"", b"1") + PURPOSE + FILE + b"--x--\r\n", 400),
        (FORM % (b"purpose", b"", b"b" * 2000) + FILE + b"--x--\r\n", 400),
        (FORM % (b"file", b"; a=" + b"b" * 9000, b"") + b"--x--\r\n", 400),
        (PURPOSE * 9 + b"--x--\r\n", 400),
        (PURPOSE + FILE, 400),  # without its end
        (b"no form", 400),
        (b"", 400),
        (PURPOSE + FORM % (b"file", b"", b"a" * 5_100_000) + b"--x--\r\n", 413),
    ],
)
def test_an_upload_is_one_form_with_one_file(door: Door, body: bytes, status: int) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x", "authorization": f"Bearer {KEY}"}
    for content in (body, iter([body[:100], body[100:]])):  # the latter without its length
        answer = httpx.post(f"{door.web.target}/v1/files", content=content, headers=headers, timeout=60)
        assert answer.status_code == status, answer.text
        if status != 200:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert list((door.folder / "uploads").iterdir()) == []


def test_lists_have_pages_and_contents_ranges(door: Door) -> None:
    files = [door.upload(f"{number}\n".encode()) for number in range(3)]
    pages = door.client.files.list(limit=2, extra_query={"purpose": "batch"})
    assert pages.has_more
    assert {each.id for each in files} <= {each.id for each in pages}
    headers = {"authorization": f"Bearer {KEY}", "range": "bytes=0-0"}
    answer = httpx.get(f"{door.web.target}/v1/files/{files[1].id}/content", headers=headers)
    assert (answer.status_code, answer.content) == (206, b"1")
    for query in ("limit=0", "limit=x", "after=nothing", "nothing=1", "order=up"):
        assert httpx.get(f"{door.web.target}/v1/files?{query}", headers=headers).status_code == 400


def test_a_folder_has_one_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_folder, "LOCK_WAIT_S", 0.2)
    first = BatchFolder(tmp_path)
    arriving = first.uploads / "arriving"
    arriving.touch()
    with pytest.raises(StillhouseError, match="Another server uses"):
        BatchFolder(tmp_path)
    assert arriving.exists()
    first.close()
    BatchFolder(tmp_path).close()
    assert not arriving.exists()


def test_a_token_counts_as_long_as_the_teacher_takes_it(models: Models, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    secrets = {
        name: create(tokens, name=name, scopes=[Scope.INFER], lifetime_s=None)[0] for name in ("ada", "eve")
    }
    with (
        no_process_left() as mark,
        start_teacher(
            models.student,
            engine="hf",
            directory=tmp_path,
            options=["--tokens", str(tokens)],
            environment=mark,
        ) as teacher,
        start_web(
            tmp_path,
            "127.0.0.1:1",
            *("--teacher", teacher.target, "--batch-dir", str(tmp_path / "kept")),
            environment=mark,
        ) as web,
    ):
        client = openai.OpenAI(base_url=f"{web.target}/v1", api_key=secrets["ada"], max_retries=0)
        door = Door(
            web=web,
            client=client,
            teacher=teacher.target,
            model=str(models.student),
            folder=tmp_path / "kept",
        )
        assert door.ended(door.create(door.rows(2))).status == "completed"
        for key in ("none", secrets["eve"] + "x"):
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key=key).files.list()
        assert secrets["ada"] not in web.log(1_000_000)
        kept = b"".join(each.read_bytes() for each in (tmp_path / "kept").rglob("*") if each.is_file())
        assert secrets["ada"].encode() not in kept
