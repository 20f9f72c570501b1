"""The complete command line: every rpc has a verb, --help is quick, failures are one sentence and a code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from stillhouse.client.cli import cli
from stillhouse.protos.stillhouse.v1 import run_pb2, teacher_pb2

VERBS = {
    "TeacherService.GetTeacherInfo": "teacher info",
    "TeacherService.GetTokenizer": "teacher tokenizer",
    "TeacherService.Generate": "generate",
    "TeacherService.Score": "score",
    "TeacherService.UploadAdapter": "teacher upload-adapter",
    "TeacherService.LoadAdapter": "teacher load-adapter",
    "TeacherService.UnloadAdapter": "teacher unload-adapter",
    "RunService.CreateRun": "run create",
    "RunService.GetRun": "run show",
    "RunService.ListRuns": "run list",
    "RunService.WatchRun": "run watch",
    "RunService.StopRun": "run stop",
    "RunService.ResumeRun": "run resume",
    "RunService.DeleteRun": "run delete",
    "RunService.QueryMetrics": "run metrics",
    "RunService.UploadDataset": "data push",
    "RunService.InspectRows": "data inspect",
    "RunService.InspectDataset": "data inspect",
    "RunService.InspectStudent": "estimate",
    "RunService.ListDatasets": "data list",
    "RunService.GetDataset": "data show",
    "RunService.DeleteDataset": "data delete",
    "RunService.ListArtifacts": "run artifacts",
    "RunService.DownloadArtifact": "run pull",
    "RunService.AttachResult": "run attach",
    "RunService.StreamLogs": "run logs",
}
NOBODY = "127.0.0.1:1"


def invoke(*arguments: str, **options: str) -> Result:
    return CliRunner().invoke(cli, arguments, **options)  # type: ignore[arg-type]


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= commands(command, f"{prefix}{name} ")
        else:
            found[prefix + name] = command
    return found


def test_every_rpc_has_a_verb() -> None:
    services = (
        teacher_pb2.DESCRIPTOR.services_by_name["TeacherService"],
        run_pb2.DESCRIPTOR.services_by_name["RunService"],
    )
    rpcs = {f"{service.name}.{method.name}" for service in services for method in service.methods}
    assert set(VERBS) == rpcs
    assert set(VERBS.values()) <= set(commands(cli))


def test_every_command_has_json_and_a_summary() -> None:
    for name, command in commands(cli).items():
        assert any("--json" in parameter.opts for parameter in command.params), name
        assert command.help, name
        assert invoke(*name.split(), "--help").exit_code == 0, name


def test_help_names_the_exit_codes() -> None:
    text = invoke("--help").stdout
    for line in ("  0    done", "  2    invalid usage", "  3    the service", "  130  interrupted"):
        assert line in text


def test_help_and_the_client_import_little() -> None:
    code = (
        "import sys, stillhouse.client.cli\n"
        "stillhouse.client.cli.cli(['--help'], standalone_mode=False)\n"
        "heavy = {'grpc', 'numpy', 'yaml', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import stillhouse.client.api, stillhouse.client.commands.run.group, stillhouse.client.commands.score\n"
        "heavy = {'torch', 'transformers', 'vllm', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "service", "flag"),
    [
        (("run", "list"), "trainer", "--trainer"),
        (("run", "watch", "latest"), "trainer", "--trainer"),
        (("teacher", "info"), "teacher", "--teacher"),
        (("generate", "hello"), "teacher", "--teacher"),
    ],
)
def test_an_unreachable_service_is_one_sentence_and_code_3(
    arguments: tuple[str, ...], service: str, flag: str
) -> None:
    result = invoke(*arguments, flag, NOBODY)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: No {service} answers at {NOBODY} (")
    assert f"Start one with `stillhouse-{service}`, or correct the address" in result.stderr
    assert result.stderr.count("\n") == 1


def test_shared_options_stand_before_or_after_the_command(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[contexts.lab]\nteacher = "127.0.0.1:2"\n')
    for arguments in (
        ("--config", str(config), "--context", "lab", "teacher", "info"),
        ("teacher", "info", "--config", str(config), "--context", "lab"),
        ("--teacher", NOBODY, "teacher", "info", "--teacher", "127.0.0.1:2"),
    ):
        assert "No teacher answers at 127.0.0.1:2 " in invoke(*arguments).stderr


def test_with_json_an_error_is_one_object() -> None:
    result = invoke("teacher", "info", "--json", "--teacher", NOBODY)
    assert result.exit_code == 3
    error = json.loads(result.stderr)["error"]
    assert error["reason"] == "TEACHER_UNREACHABLE"
    assert error["metadata"] == {"target": NOBODY}


def test_bad_usage_is_code_2(tmp_path: Path) -> None:
    assert invoke("run", "show").exit_code == 2
    assert invoke("nonsense").exit_code == 2
    assert invoke("generate", "x", "--temperature", "-1").exit_code == 2
    result = invoke("run", "show", "NOT-AN-ID")
    assert (result.exit_code, result.stderr.split(":")[0]) == (2, "Error")
    run_file = tmp_path / "run.yaml"
    run_file.write_text("studnet: {}\n")
    result = invoke("run", "create", str(run_file), "--trainer", NOBODY)
    assert result.exit_code == 2
    assert result.stderr == f'{run_file}:1:1: studnet: there is no such field; did you mean "student"?\n'
    result = invoke("run", "create", str(run_file), "--json")
    violations = json.loads(result.stderr)["error"]["violations"]
    assert violations == [
        {
            "field": "studnet",
            "description": 'there is no such field; did you mean "student"?',
            "line": 1,
            "column": 1,
        }
    ]


def test_version_is_printed() -> None:
    assert json.loads(invoke("version", "--json").stdout)["contract"] == "stillhouse.v1"
    assert invoke("version").stdout.startswith("stillhouse ")


def test_a_full_disk_behind_the_output_is_one_sentence(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stillhouse.client", "data", "inspect", str(rows)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == (
        "Error: cannot write the output: No space left on device; free some space there, or name another place.\n"
    )


def test_a_name_that_the_machine_refuses_is_one_sentence(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    os.mkfifo(tmp_path / "pipe")
    for source, out, said in (
        (rows, tmp_path / ("a" * 300), f"cannot use {tmp_path / ('a' * 300)}: File name too long."),
        (rows, tmp_path / "pipe", "pipe: it is a pipe, which a file would replace; name a file."),
        ("", tmp_path / "out", ". cannot be read as a directory"),
        ("/", tmp_path / "out", "/ cannot be read as a directory"),
    ):
        done = CliRunner().invoke(cli, ["data", "convert", str(source), "--to", "rows", "--out", str(out)])
        assert done.exit_code in (1, 2), done.output
        assert said in done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "rows.jsonl"]
