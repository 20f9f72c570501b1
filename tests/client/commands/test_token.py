"""`stillhouse token`: a token is shown once or written to a separate file, listed without its secret, and revoked."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from stillhouse.client.cli import cli
from stillhouse.protos.rpc import tokens
from stillhouse.protos.rpc.tokens import Scope


def token(*arguments: str, file: Path) -> Result:
    return CliRunner().invoke(cli, ["token", *arguments, "--file", str(file)])


def test_a_token_is_created_listed_and_revoked(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    made = token(
        "create", "--name", "ci", "--scope", "submit", "--scope", "infer", "--expires", "2h", file=file
    )
    assert made.exit_code == 0, made.stderr
    secret = made.stdout.strip()
    assert "ci: infer, submit; expires 20" in made.stderr
    found = tokens.lookup(tokens.read(file), secret)
    assert found is not None
    assert found.scopes == {Scope.SUBMIT, Scope.INFER}
    assert found.expire_time_s is not None
    assert abs(found.expire_time_s - found.create_time_s - 7200) < 2

    listed = token("list", file=file)
    assert secret not in listed.stdout + listed.stderr
    assert listed.stdout.splitlines()[1].split()[:3] == [found.id, "ci", "infer,submit"]
    (row,) = json.loads(token("list", "--json", file=file).stdout)["tokens"]
    assert (row["id"], row["expired"]) == (found.id, False)

    assert token("create", "--name", "ci", "--scope", "admin", file=file).exit_code == 2
    assert token("revoke", "ci", file=file).stdout == f"{found.id} of ci is revoked\n"
    assert token("revoke", "ci", file=file).exit_code == 4
    assert token("list", file=file).stdout.startswith("There are no tokens")


def test_a_token_may_go_straight_to_a_file_which_is_never_overwritten(tmp_path: Path) -> None:
    file, target = tmp_path / "tokens.json", tmp_path / "ci.token"
    arguments = ("create", "--name", "ci", "--scope", "admin", "--expires", "never", "--to", str(target))
    made = token(*arguments, "--json", file=file)
    assert json.loads(made.stdout)["expire_time"] is None
    secret = target.read_text().strip()
    assert secret not in made.stdout + made.stderr
    assert target.stat().st_mode & 0o777 == 0o600
    assert tokens.lookup(tokens.read(file), secret) is not None
    again = token(*arguments, file=file)
    assert again.exit_code == 2
    assert target.read_text().strip() == secret
    other = tmp_path / "other.token"
    refused = token(*arguments[:-1], str(other), file=file)
    assert (refused.exit_code, other.exists()) == (2, False)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    refused = token("create", "--name", "ci", "--scope", "infer", file=tmp_path / "trainer" / "tokens.json")
    assert refused.exit_code == 2
    assert f"there is no folder {tmp_path / 'trainer'}. Name a run service's data directory" in refused.output
    assert not (tmp_path / "trainer").exists()


def test_bad_values_are_usage_errors(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    for wrong in (["--expires", "soon"], ["--expires", "0d"], ["--scope", "root"], ["--name", "a b"]):
        good = {"--name": "ci", "--scope": "infer"} | {wrong[0]: wrong[1]}
        assert token("create", *[text for pair in good.items() for text in pair], file=file).exit_code == 2
    assert token("list", file=file).exit_code == 2
    assert not file.exists()
