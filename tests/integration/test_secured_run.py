"""A run between services that let nobody in: mutual TLS and tokens on both sides, credentials in the trainer's own file."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillhouse.client.api import Trainer
from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.rpc import tokens
from stillhouse.protos.rpc.tokens import Scope
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.conftest import Models
from tests.support.networks.certificates import Certificates, make_certificates
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher, start_trainer
from tests.support.runs import Service, completed, small_spec, stillhouse, wait_until

# A training process that has all its answers hangs up, and the service may see that before the call's end.
COUNTED = re.compile(r'stillhouse_calls_total\{outcome="(OK|CANCELLED)",rpc="Score"\}')


@dataclass(frozen=True, kw_only=True, slots=True)
class Secured:
    teacher: Program
    service: Service
    certificates: Certificates
    teacher_tokens: Path
    token: str
    """Token of the client at the trainer."""
    training_token: str
    """Token of the training process at the teacher."""
    metrics_port: int


@pytest.fixture(scope="module")
def secured(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    root = tmp_path_factory.mktemp("secured")
    certificates = make_certificates(root)
    server, client, ca = certificates.server, certificates.client, certificates.authority.cert
    tls = ["--tls-cert", str(server.cert), "--tls-key", str(server.key), "--tls-client-ca", str(ca)]
    data_dir, teacher_tokens = root / "data", root / "teacher-tokens.json"
    data_dir.mkdir()
    training_token, _ = tokens.create(teacher_tokens, name="trainer", scopes=[Scope.INFER], lifetime_s=3600)
    token, _ = tokens.create(data_dir / "tokens.json", name="ada", scopes=[Scope.SUBMIT], lifetime_s=3600)
    (root / "training.token").write_text(training_token + "\n")
    credentials = data_dir / "credentials.toml"
    entries = {"ca": ca, "certificate": client.cert, "key": client.key, "token_file": root / "training.token"}
    credentials.write_text("[lab]\n" + "".join(f'{key} = "{value}"\n' for key, value in entries.items()))
    credentials.chmod(0o600)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher,
            engine="hf",
            directory=root,
            options=[
                *("--dtype", "float32", "--threads", "1", *tls),
                *("--tokens", str(teacher_tokens), "--audit-log", str(root / "audit.jsonl")),
                *("--metrics-port", str(port)),
            ],
            environment=mark,
        ) as teacher,
        start_trainer(
            data_dir, directory=root, options=["--stop-runs-on-exit", *tls], environment=mark
        ) as program,
    ):
        yield Secured(
            teacher=teacher,
            service=Service(program=program, data_dir=data_dir),
            certificates=certificates,
            teacher_tokens=teacher_tokens,
            token=token,
            training_token=training_token,
            metrics_port=port,
        )


def spec_of(
    secured: Secured, models: Models, dataset_file: Path, credential: str = "lab"
) -> dict[str, object]:
    spec = small_spec(student=models.student, train=dataset_file, teacher=secured.teacher.target, steps=3)
    spec["teachers"][0]["credential"] = credential
    return spec


def metrics_of(secured: Secured) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{secured.metrics_port}/metrics", timeout=20) as page:
        text: str = page.read().decode()
    return text


def test_a_run_trains_through_mutual_tls_and_tokens_and_leaks_none(
    secured: Secured, models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    certificates, service = secured.certificates, secured.service
    client = {
        "tls_ca": certificates.authority.cert,
        "tls_cert": certificates.client.cert,
        "tls_key": certificates.client.key,
    }
    with Trainer(service.target, **client) as nobody, pytest.raises(StillhouseError) as refused:
        nobody.create_run(spec_of(secured, models, dataset_file))
    assert refused.value.reason is Reason.UNAUTHENTICATED
    with Trainer(service.target, **client, token=secured.token) as trainer:
        handle = trainer.create_run(spec_of(secured, models, dataset_file))
        run = completed(handle, service)
        unknown = trainer.create_run(spec_of(secured, models, dataset_file, credential="nowhere")).wait()
        assert "has no section [nowhere]" in unknown.error.message

        # The command line finds the token in the file that it is told of.
        (tmp_path / "token").write_text(secured.token)
        flags = [f"--{name.replace('_', '-')}={path}" for name, path in client.items()]
        shown = stillhouse(
            *("run", "list", "--json", "--trainer", service.target, *flags),
            *("--token-file", str(tmp_path / "token")),
        )
        assert {each["name"] for each in json.loads(shown.stdout)["runs"]} == {run.name, unknown.name}

        # A call is counted when it has ended for the service, which may be after it has for its caller.
        wait_until(lambda: COUNTED.search(metrics_of(secured)) is not None, "the Score call is counted")
        text = metrics_of(secured)
        assert "stillhouse_tokens_scored_total" in text
        assert "stillhouse_engine_used 0.0" in text

        tokens.revoke(secured.teacher_tokens, "trainer")
        locked_out = trainer.create_run(spec_of(secured, models, dataset_file)).wait()
        assert locked_out.state == Run.STATE_FAILED
        assert from_status(locked_out.error).reason is Reason.UNAUTHENTICATED

    lines = [json.loads(line) for line in (service.data_dir.parent / "audit.jsonl").read_text().splitlines()]
    told = {(line["who"], line["rpc"], line["outcome"]) for line in lines}
    assert {("trainer", "TeacherService/Score", outcome) for outcome in ("OK", "CANCELLED")} & told
    assert ("anybody", "TeacherService/GetTeacherInfo", "UNAUTHENTICATED") in told
    secrets = (secured.token.encode(), secured.training_token.encode())
    files = [path for path in service.data_dir.parent.rglob("*") if path.is_file()]
    leaks = [path.name for path in files if any(secret in path.read_bytes() for secret in secrets)]
    assert leaks == ["training.token"]
