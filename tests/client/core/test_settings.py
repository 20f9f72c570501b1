"""Precedence of settings: flag, environment, context, file, default."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.client.core.settings import DEFAULT_TEACHER, DEFAULT_TRAINER, Settings, load_settings
from stillhouse.protos.errors import StillhouseError

CONFIG = """
trainer = "top:1"
teacher = "top:2"
tls_ca = "ca.pem"
context = "home"

[contexts.home]
trainer = "home:1"

[contexts.lab]
trainer = "lab:1"
tls = true
token_file = "secret"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def load(config: Path | None, context: str | None = None, flags: dict[str, str | None] | None = None, **env: str) -> Settings:  # fmt: skip
    return load_settings(flags or {}, context=context, config=config, environment=env)


def test_without_anything_the_services_are_on_this_machine(tmp_path: Path) -> None:
    settings = load(None, XDG_CONFIG_HOME=str(tmp_path))
    assert (settings.trainer, settings.teacher) == (DEFAULT_TRAINER, DEFAULT_TEACHER)
    assert settings == Settings()


def test_flag_beats_environment_beats_context_beats_file(config: Path) -> None:
    assert load(config).trainer == "home:1"
    assert load(config).teacher == "top:2"
    assert load(config, "lab").trainer == "lab:1"
    assert load(config, STILLHOUSE_CONTEXT="lab").trainer == "lab:1"
    assert load(config, "lab", STILLHOUSE_TRAINER="env:1").trainer == "env:1"
    assert load(config, "lab", {"trainer": "flag:1"}, STILLHOUSE_TRAINER="env:1").trainer == "flag:1"


def test_the_file_may_be_named_by_the_environment_or_lie_at_home(config: Path, tmp_path: Path) -> None:
    assert load(None, STILLHOUSE_CONFIG=str(config)).teacher == "top:2"
    (tmp_path / "stillhouse").mkdir()
    config.rename(tmp_path / "stillhouse" / "config.toml")
    assert load(None, XDG_CONFIG_HOME=str(tmp_path)).teacher == "top:2"


def test_paths_in_the_file_are_relative_to_it(config: Path, tmp_path: Path) -> None:
    settings = load(config, "lab")
    assert settings.tls_ca == tmp_path / "ca.pem"
    assert settings.tls
    (tmp_path / "secret").write_text("abc\n")
    assert settings.token() == "abc"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trainer = 5", "trainer expects text in quotes, not 5."),
        ('trainr = "x"', 'there is no setting trainr; did you mean "trainer"?'),
        ('[contexts.lab]\ntls = "yes"', "contexts.lab.tls expects true or false, not 'yes'."),
        ("contexts = 3", r"contexts expects tables such as \[contexts.lab\]."),
        ("a b", "is not valid TOML"),
    ],
)
def test_a_bad_file_gets_one_sentence(config: Path, text: str, sentence: str) -> None:
    config.write_text(text)
    with pytest.raises(StillhouseError, match=sentence):
        load(config, "lab")


def test_unknown_contexts_and_absent_files_are_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match=r'there is no context "labb"; .*config\.toml has: home, lab\.'):
        load(config, "labb")
    with pytest.raises(StillhouseError, match=r"cannot read .*absent\.toml: No such file or directory\."):
        load(tmp_path / "absent.toml")


def test_half_a_certificate_and_an_odd_boolean_are_refused(config: Path) -> None:
    with pytest.raises(StillhouseError, match="--tls-cert and --tls-key go together"):
        load(config, STILLHOUSE_TLS_CERT="cert.pem")
    with pytest.raises(StillhouseError, match='STILLHOUSE_TLS expects true or false, not "maybe"'):
        load(config, STILLHOUSE_TLS="maybe")


@pytest.mark.parametrize("content", ["", "two\nlines", "x" * 9000, "\x1b[31m"])
def test_a_token_is_one_line_of_ascii(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(StillhouseError, match="must hold one line of ASCII, the token"):
        Settings(token_file=path).token()
