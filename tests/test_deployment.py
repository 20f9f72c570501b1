"""Images, compose file and workflows name only what exists: files, targets, programs, options, ports, make's commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from stillhouse.client.cli import cli
from stillhouse.student_trainer.runs import __main__ as trainer
from stillhouse.teacher_service import __main__ as teacher

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS: dict[str, click.Command] = {
    "stillhouse": cli,
    "stillhouse-teacher": teacher.serve,
    "stillhouse-trainer": trainer.main,
}
ROLES = {"teacher-cuda", "teacher-cpu", "trainer", "client"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_every_program_is_looked_at() -> None:
    assert PROGRAMS.keys() == PROJECT["scripts"].keys()
    with pytest.raises(AssertionError, match="No such option"):
        _parse(["stillhouse-teacher", "--nonsense", "1"])


def test_every_role_has_an_image_that_ends_as_a_user_without_rights() -> None:
    images = _images()
    assert images.keys() >= ROLES
    for role in ROLES:
        users = [rest for word, rest in images[role] if word == "USER"]
        assert users[-1:] == ["10001"], role


def test_what_images_copy_exists_and_reaches_the_build() -> None:
    allowed = _dockerignore()
    for target, steps in _images().items():
        for word, rest in steps:
            if word != "COPY" or "--from=" in rest:
                continue
            for source in shlex.split(rest)[:-1]:
                assert (ROOT / source).exists(), (target, source)
                assert any(fnmatch(source, pattern) or source.startswith(pattern) for pattern in allowed), (
                    source
                )


def test_the_build_gets_every_package_that_the_wheel_is_made_of() -> None:
    copied = {
        source.rstrip("/")
        for word, rest in _images()["wheel"]
        if word == "COPY"
        for source in shlex.split(rest)[:-1]
    }
    links = {path.name for path in (ROOT / "stillhouse").iterdir() if path.is_symlink()}
    assert copied >= {"pyproject.toml", "stillhouse", PROJECT["readme"], *PROJECT["license-files"], *links}


def test_images_install_extras_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text()
    named = {extra for group in re.findall(r"\.whl\)\[([a-z,-]+)\]", text) for extra in group.split(",")}
    assert named
    assert named <= PROJECT["optional-dependencies"].keys()


def test_images_run_programs_with_options_and_ports_that_exist() -> None:
    ports = {"stillhouse-teacher": "7401", "stillhouse-trainer": "7402"}
    for role in ROLES:
        steps = _images()[role]
        entry = json.loads(_last(steps, "ENTRYPOINT"))
        _parse([*entry, *json.loads(_last(steps, "CMD"))])
        if entry[0] in ports:
            port = ports[entry[0]]
            assert _default(entry[0], "listen") == f"127.0.0.1:{port}"
            assert _last(steps, "EXPOSE").split() == [port, str(int(port) + 100)]
            check = _last(steps, "HEALTHCHECK").partition("CMD")[2]
            assert port in check
            _parse(json.loads(check))


def test_the_compose_file_starts_roles_with_options_that_exist() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    images = _images()
    for name, service in compose["services"].items():
        target = service["build"]["target"]
        assert target in ROLES
        arguments = {rest.partition("=")[0] for word, rest in images[target] if word == "ARG"}
        assert service["build"].get("args", {}).keys() <= arguments
        entry = json.loads(_last(images[target], "ENTRYPOINT"))
        if "command" in service:
            _parse([*entry, *service["command"]])
            assert service["command"][service["command"].index("--listen") + 1].startswith("0.0.0.0:")
            _parse(service["healthcheck"]["test"][1:])
        assert "ports" not in service, f"{name} speaks without TLS"
        assert set(service["networks"]) <= compose["networks"].keys()
        volumes = {volume.partition(":")[0] for volume in service["volumes"] if volume[0] not in "$./"}
        assert volumes <= compose["volumes"].keys()
        assert service.get("depends_on", {}).keys() <= compose["services"].keys()


def test_the_client_of_the_compose_file_finds_the_services() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    for variable, target in compose["services"]["client"]["environment"].items():
        option = "--" + variable.removeprefix("STILLHOUSE_").lower()
        _parse(["stillhouse", option, target, "version"])
        service, _, port = target.partition(":")
        command = compose["services"][service]["command"]
        assert command[command.index("--listen") + 1].endswith(f":{port}")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_commands_of_the_makefile(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflow = yaml.safe_load(path.read_text())
    ran = 0
    for job in workflow["jobs"].values():
        choices = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            if not step.get("run", "").startswith("make "):
                continue
            target = step["run"].split()[1]
            suite = re.search(r"matrix\.(\w+)", step["run"])
            for name in choices[suite[1]] if suite else [target]:
                assert name in targets
                ran += 1
        assert "timeout-minutes" in job
    assert ran
    assert workflow["permissions"] == {"contents": "read"}


def test_hooks_are_valid_and_run_tools_that_the_setup_installs() -> None:
    path = ROOT / ".pre-commit-config.yaml"
    subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-config", path], check=True, capture_output=True
    )
    makefile = (ROOT / "Makefile").read_text()
    for hook in yaml.safe_load(path.read_text())["repos"][0]["hooks"]:
        program, *arguments = hook["entry"].split()
        if program == "make":
            assert f"\n{arguments[-1]}:" in makefile
        elif arguments and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).is_file()
        else:
            assert (Path(sys.executable).parent / Path(program).name).is_file(), program


def _images() -> dict[str, list[tuple[str, str]]]:
    """Target to its instructions, word and rest, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    images: dict[str, list[tuple[str, str]]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            # Inherited packages come before a stage's own.
            images[name] = list(images.get(parent, []))
        elif word:
            images[name].append((word, rest.strip()))
    return images


def _last(steps: Sequence[tuple[str, str]], word: str) -> str:
    return [rest for found, rest in steps if found == word][-1]


def _dockerignore() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def _default(program: str, option: str) -> object:
    return next(parameter.default for parameter in PROGRAMS[program].params if parameter.name == option)


def _parse(line: Sequence[str]) -> None:
    """Reads a command line as the program would, with --help at its end; an unknown command or option is an error."""
    done = CliRunner().invoke(PROGRAMS[line[0]], [*line[1:], "--help"])
    assert done.exit_code == 0, f"{' '.join(line)}:\n{done.output}"
