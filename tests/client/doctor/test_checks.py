"""`stillhouse doctor` on healthy, absent, remote and secured services, and on a certificate near its end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from stillhouse.client.cli import cli
from stillhouse.client.core.settings import Settings
from stillhouse.client.doctor.checks import certificate, proxy, teacher
from stillhouse.protos.rpc import tokens
from stillhouse.protos.rpc.tokens import Scope
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.lifecycle import _TeacherProcess
from tests.conftest import Models
from tests.support.networks.certificates import make_certificates
from tests.support.programs import Program


def doctor(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = CliRunner().invoke(cli, ["doctor", "--json", *arguments])
    document = json.loads(result.stdout)
    assert document["well"] == (result.exit_code == 0)
    return result.exit_code, {each["check"]: each for each in document["findings"]}


def test_healthy_services_and_a_student_of_the_same_tokenizer(
    hf_teacher: Program, trainer_service: Callable[..., Program], models: Models
) -> None:
    trainer = trainer_service()
    services = ("--teacher", hf_teacher.target, "--trainer", trainer.target)
    code, found = doctor(*services, "--student", str(models.student))
    assert code == 0, found
    assert str(models.teacher) in found["teacher"]["found"]
    assert found["tokenizers"]["state"] == "ok"
    assert "0 live and 0 pending" in found["trainer"]["found"]
    assert {"client", "memory", "disk", "GPU", "teacher's version"} <= set(found)
    code, found = doctor(*services, "--student", str(models.foreign), "--only", "teacher")
    assert (code, found["tokenizers"]["state"]) == (1, "failed")
    assert "stillhouse teacher tokenizer" in found["tokenizers"]["remedy"]
    _, found = doctor(*services, "--student", "/nowhere", "--only", "teacher")
    assert found["tokenizers"]["found"] == "/nowhere has no tokenizer.json"
    text = CliRunner().invoke(cli, ["doctor", *services]).stdout
    assert "ok    teacher " in text


def test_absent_services_are_reported_with_a_remedy() -> None:
    code, found = doctor("--teacher", "127.0.0.1:1", "--trainer", "127.0.0.1:1")
    assert code == 1
    assert "Start one with `stillhouse-teacher`" in found["teacher"]["found"]
    assert found["trainer"]["state"] == "failed"


def test_a_secured_service_needs_a_token_and_secrets_need_mode_600(
    trainer_service: Callable[..., Program], tmp_path: Path
) -> None:
    data_dir = tmp_path / "trainer-data"
    data_dir.mkdir()
    token, _ = tokens.create(data_dir / "tokens.json", name="a", scopes=[Scope.SUBMIT], lifetime_s=None)
    (tmp_path / "token").write_text(token)
    (data_dir / "credentials.toml").touch(mode=0o600)
    service = trainer_service()
    code, found = doctor("--trainer", service.target, "--only", "trainer")
    assert (code, found["trainer"]["remedy"]) == (1, "Give a token with --token-file.")
    given = ("--trainer", service.target, "--token-file", str(tmp_path / "token"))
    assert doctor(*given, "--only", "trainer")[0] == 0
    (data_dir / "credentials.toml").chmod(0o644)
    code, found = doctor("--only", "here", "--data-dir", str(data_dir))
    assert (code, found["tokens.json"]["state"]) == (1, "ok")
    assert found["credentials.toml"]["remedy"] == f"chmod 600 {data_dir / 'credentials.toml'}"


@pytest.mark.parametrize(
    ("days", "state", "text"),
    [(0, "warning", "valid for 2 days"), (5, "failed", "expired 3 days ago"), (-3, "failed", "not valid yet"), (-40, "failed", "not valid yet")],
)  # fmt: skip
def test_a_certificate_says_how_long_it_lasts(tmp_path: Path, days: int, state: str, text: str) -> None:
    made = make_certificates(tmp_path)  # valid from today, for two days
    finding = certificate("own certificate", made.client.cert, time.time() + days * 86400)
    assert (finding.state, text in finding.found) == (state, True), finding
    assert finding.remedy
    assert certificate("own certificate", made.client.key).state == "failed"


def test_the_certificate_that_a_service_presents_is_checked(
    trainer_service: Callable[..., Program], tmp_path: Path
) -> None:
    made = make_certificates(tmp_path)
    tls = ("--tls-cert", str(made.server.cert), "--tls-key", str(made.server.key))
    target = trainer_service(*tls, "--tls-client-ca", str(made.authority.cert)).target
    own = ("--tls-cert", str(made.client.cert), "--tls-key", str(made.client.key))
    code, found = doctor("--trainer", target, "--only", "trainer", "--tls-ca", str(made.authority.cert), *own)
    assert (code, found["trainer"]["state"]) == (0, "ok")
    assert found["trainer's certificate"]["state"] == "warning"
    assert "valid for 2 days" in found["trainer's certificate"]["found"]
    code, found = doctor("--trainer", target, "--only", "trainer", "--tls-ca", str(made.stranger.cert), *own)
    assert (code, found["trainer's certificate"]["state"]) == (1, "failed")
    assert "--tls-ca" in found["trainer's certificate"]["remedy"]


def test_a_target_elsewhere_without_tls_is_marked() -> None:
    _, found = doctor("--teacher", "192.0.2.1:7401", "--trainer", "127.0.0.1:1", "--only", "trainer")
    assert found["trainer"]["state"] == "failed"
    from stillhouse.client.doctor import checks

    (finding,) = checks._exposure("teacher", "192.0.2.1:7401", Settings(teacher="192.0.2.1:7401"))
    assert finding.state == "warning"
    assert "--tls-cert" in finding.remedy


async def test_a_teacher_that_loads_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = TeacherConfig(model=str(tmp_path), listen="127.0.0.1:0", metrics_port=0)
    server = _TeacherProcess(config)._make_server()
    target = await server.start()
    began = time.monotonic()
    try:
        (finding,) = await asyncio.to_thread(lambda: list(teacher(Settings(teacher=target), None)))
    finally:
        await server.stop(0)
    assert (finding.check, finding.state) == ("teacher", "warning"), finding
    assert f"The teacher is loading {tmp_path}" in finding.found
    assert finding.remedy == "Wait until it has loaded."
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"https_proxy": "http://ada:secret@proxy:3128"}, "the proxy proxy:3128 of https_proxy"),
        ({"https_proxy": "http://a:1", "grpc_proxy": "http://b:2"}, "the proxy b:2 of grpc_proxy"),
        ({"http_proxy": "http://a:1", "no_proxy": "other, .lab.example"}, None),
        ({"http_proxy": "http://a:1", "no_proxy": "other"}, "the proxy a:1 of http_proxy"),
        ({"http_proxy": "http://a:1", "no_proxy": "gpu", "no_grpc_proxy": "x"}, "the proxy a:1"),
        ({"HTTPS_PROXY": "http://a:1"}, None),
    ],
)
def test_a_proxy_on_the_way_is_told(environment: dict[str, str], found: str | None) -> None:
    findings = list(proxy("teacher", "gpu.lab.example:7401", environment))
    assert [found in each.found for each in findings if found] == [True] * bool(found)
    assert len(findings) == bool(found)
    assert not [each for each in findings if "secret" in each.found]
    assert not list(proxy("teacher", "127.0.0.1:7401", environment))
