"""Files sent to a hub: the files that were pulled, without a path of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import huggingface_hub.errors
import pytest

from stillhouse.client.trainer.hub import _additions, _hub_errors
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.adapter import CONFIG, name_base


def test_an_adapters_base_is_named_by_its_folder_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    files = [tmp_path / CONFIG, tmp_path / "base" / "config.json"]
    for file in files:
        file.write_text('{"base_model_name_or_path": null}')
    (tmp_path / "secret.txt").write_text("mine")
    name_base(tmp_path, tmp_path)
    sent = {
        each.path_in_repo: each.path_or_fileobj
        for each in _additions(huggingface_hub, files, tmp_path, None, None)
    }
    assert sent.keys() == {CONFIG, "base/config.json"}
    assert json.loads(sent[CONFIG]) == {"base_model_name_or_path": "base"}
    assert str(tmp_path) in files[0].read_text()


@pytest.mark.parametrize(
    ("named", "option", "sent"),
    [
        ("Qwen/Qwen2.5-0.5B", None, "Qwen/Qwen2.5-0.5B"),
        ("gpt2", None, "gpt2"),
        ("/cache/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b", None, "Qwen/Qwen2.5-0.5B"),
        ("/data/models/llama", "me/llama", "me/llama"),
    ],
)
def test_an_ordinary_adapter_names_its_base_by_its_hub_id(
    tmp_path: Path, named: str, option: str | None, sent: str
) -> None:
    config = tmp_path / CONFIG
    config.write_text(json.dumps({"base_model_name_or_path": named, "r": 8}))
    [addition] = _additions(huggingface_hub, [config], tmp_path, None, option)
    assert json.loads(addition.path_or_fileobj) == {"base_model_name_or_path": sent, "r": 8}


def test_a_base_that_a_path_of_another_machine_names_is_refused(tmp_path: Path) -> None:
    config = tmp_path / CONFIG
    for named in ("/data/models/llama", "models/../llama", None):
        config.write_text(json.dumps({"base_model_name_or_path": named}))
        with pytest.raises(StillhouseError, match=r"a path of another machine.* --base-model OWNER/NAME"):
            _additions(huggingface_hub, [config], tmp_path, None, None)


def _refused(status: int) -> Exception:
    response: Any = httpx.Response(status, request=httpx.Request("POST", "http://hub"))
    return huggingface_hub.errors.HfHubHTTPError("No.", response=response)


@pytest.mark.parametrize(
    ("error", "reason", "told"),
    [
        (
            FileNotFoundError(2, "No such file", "/data/a.bin"),
            Reason.INVALID_REQUEST,
            "cannot read /data/a.bin",
        ),
        (ConnectionResetError(104, "Reset"), Reason.SERVICE_UNREACHABLE, "was not reached"),
        (httpx.ConnectError("No route"), Reason.SERVICE_UNREACHABLE, "was not reached"),
        (ValueError("Invalid metadata in README.md."), Reason.INVALID_REQUEST, "The hub refuses README.md"),
        (ValueError("path_in_repo is empty"), Reason.INVALID_REQUEST, "cannot be sent to me/a: path_in_repo"),
        (_refused(413), Reason.INVALID_REQUEST, "Correct what it names"),
        (_refused(429), Reason.SERVICE_UNREACHABLE, "Try again later"),
        (_refused(503), Reason.SERVICE_UNREACHABLE, "Try again later"),
    ],
)
def test_an_error_is_that_of_its_cause(error: Exception, reason: Reason, told: str) -> None:
    with pytest.raises(StillhouseError) as caught, _hub_errors(huggingface_hub, "me/a", "http://hub"):
        raise error
    assert caught.value.reason is reason
    assert told in caught.value.message


def test_what_cannot_be_read_is_named_before_a_repository_is_made(tmp_path: Path) -> None:
    for name, content, told in (
        (CONFIG, "[]", "is no configuration of an adapter"),
        ("README.md", "---\n: [\n---\n", "is no model card"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(StillhouseError, match=told):
            _additions(huggingface_hub, [tmp_path / name], tmp_path, "mit", None)
    with pytest.raises(StillhouseError, match=r"cannot read .*weights: No such file"):
        _additions(huggingface_hub, [tmp_path / "weights"], tmp_path, None, None)
