"""Tokens file: stores hashes only, serializes commands, refuses malformed and exposed files."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc import tokens as auth_tokens
from stillhouse.protos.rpc.auth import TokenFile
from stillhouse.protos.rpc.tokens import Scope


def make(path: Path, name: str = "ci", lifetime_s: float | None = None) -> str:
    return auth_tokens.create(path, name=name, scopes=[Scope.SUBMIT], lifetime_s=lifetime_s)[0]


def test_a_token_is_found_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    secret = make(path)
    text = path.read_text()
    assert secret not in text
    assert secret.split("_", 2)[2] not in text
    assert hashlib.sha256(secret.encode()).hexdigest() in text
    assert path.stat().st_mode & 0o777 == 0o600
    found = auth_tokens.lookup(auth_tokens.read(path), secret)
    assert found is not None
    assert (found.name, found.scopes, found.expire_time_s) == ("ci", frozenset({Scope.SUBMIT}), None)
    assert [each.name for each in tmp_path.iterdir()] == ["tokens.json"]


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: s + "A", lambda s: s.upper(), lambda s: ""])
def test_another_secret_with_the_same_id_is_not_found(tmp_path: Path, change: object) -> None:
    secret = make(tmp_path / "tokens.json")
    tokens = auth_tokens.read(tmp_path / "tokens.json")
    assert auth_tokens.lookup(tokens, change(secret)) is None  # type: ignore[operator]


def test_tokens_expire_and_free_their_names(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    make(path, lifetime_s=50)
    (token,) = auth_tokens.read(path).values()
    assert not token.expired(token.create_time_s + 48)
    assert token.expired(token.create_time_s + 51)
    with pytest.raises(StillhouseError, match="revoke it first"):
        make(path)
    assert [each.name for each in auth_tokens.revoke(path, token.id)] == ["ci"]
    make(path)


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 65, "a\n"])
def test_names_that_would_confuse_a_log_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StillhouseError, match="not a valid token name"):
        make(tmp_path / "tokens.json", name)


def test_concurrent_commands_lose_no_token(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda number: make(path, f"t{number}"), range(24)))
    tokens = auth_tokens.read(path)
    assert all(auth_tokens.lookup(tokens, secret) is not None for secret in secrets)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 2, "tokens": []}', '{"version": 1, "tokens": [{"id": "a"}]}', "\udc80"]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    path.chmod(0o600)
    with pytest.raises(StillhouseError, match="is not a tokens file") as caught:
        TokenFile(path)
    assert caught.value.reason == Reason.INVALID_CONFIG


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    make(path)
    path.chmod(0o640)
    with pytest.raises(StillhouseError, match=f"chmod 600 {path}"):
        TokenFile(path)
    with pytest.raises(StillhouseError, match="cannot be used"):
        TokenFile(tmp_path / "missing.json")


def test_an_optional_file_requires_tokens_from_its_creation_on(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.json", optional=True)
    assert not tokens.required
    secret = make(tmp_path / "tokens.json")
    assert tokens.required
    assert tokens.lookup(secret) is not None
    (tmp_path / "tokens.json").unlink()
    assert tokens.required
    assert tokens.lookup(secret) is None
