"""Settings of a teacher on an upstream server: address, key, and what belongs to other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engines.openai.credentials import VARIABLE, Upstream, read_upstream

KEY = "sk-very-secret-0123456789"
UPSTREAM = {"engine": "openai", "upstream": "http://127.0.0.1:1", "tokenizer": "org/model"}


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"upstream": ""}, "needs --upstream"),
        ({"tokenizer": ""}, "needs --tokenizer"),
        ({"adapters": (("a", Path("a")),)}, "load it there"),
        ({"dtype": "float16"}, "--dtype is float16"),
        ({"quantization": "nf4"}, "--quantization is nf4"),
        ({"tier": "raw"}, "--tier is raw"),
        ({"upstream_concurrency": 0}, "--upstream-concurrency is 0"),
        ({"engine": "hf"}, "--upstream is http"),
        ({"engine": "hf", "upstream": "", "tokenizer": ""}, "Give --model"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(StillhouseError, match=part):
        TeacherConfig(**{**UPSTREAM, **fields})


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("ftp://host", "Give an address"),
        ("host:8000", "Give an address"),
        ("http://", "Give an address"),
        ("http://host:99999", "not an address"),
        ("http://host?key=1", "Give an address"),
        (f"http://me:{KEY}@host", "user or a password"),
        ("http://gpu-host:8000", "without TLS"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused(
    url: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    with pytest.raises(StillhouseError, match=part) as caught:
        read_upstream(url, None, insecure=False)
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert KEY not in caught.value.message


def test_keys_come_from_a_file_the_environment_or_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "https://api.example/v1/"
    assert read_upstream(url, None, insecure=False) == Upstream(url="https://api.example", key="")
    folder, file = tmp_path / "credentials", tmp_path / "key"
    folder.mkdir()
    (folder / "upstream-api-key").write_text("third\n")
    file.write_text("first\n")
    file.chmod(0o600)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    assert read_upstream(url, None, insecure=False).key == "third"
    monkeypatch.setenv(VARIABLE, "second")
    assert read_upstream(url, None, insecure=False).key == "second"
    assert read_upstream(url, file, insecure=False).key == "first"
    for content, mode, part in (
        ("a b", 0o600, "one line"),
        ("", 0o600, "one line"),
        ("a", 0o644, "chmod 600"),
    ):
        file.write_text(content)
        file.chmod(mode)
        with pytest.raises(StillhouseError, match=part):
            read_upstream(url, file, insecure=False)
    with pytest.raises(StillhouseError, match="cannot be read"):
        read_upstream(url, tmp_path / "none", insecure=False)
