"""Addresses and credentials of the services: flag, else STILLHOUSE_* environment, else config.toml, else the default."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stillhouse.client.core.errors import file_error, file_errors, usage_error

DEFAULT_TRAINER = "127.0.0.1:7402"
DEFAULT_TEACHER = "127.0.0.1:7401"
ENVIRONMENT_PREFIX = "STILLHOUSE_"
MAX_TOKEN_BYTES = 8192
LEAST_SIMILARITY = 0.82
"""Least similarity of a misspelt name to the one that is meant."""
_PATHS = {"tls_ca", "tls_cert", "tls_key", "token_file"}
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Addresses and credentials of the services."""

    trainer: str = DEFAULT_TRAINER
    """`host:port` or `unix:PATH` of the run service."""
    teacher: str = DEFAULT_TEACHER
    """`host:port` or `unix:PATH` of the teacher; replicas of one teacher are separated by commas."""
    tls: bool = False
    """TLS with the system's authorities; implied by any other TLS setting."""
    tls_ca: Path | None = None
    """Authorities to trust instead, PEM."""
    tls_cert: Path | None = None
    """Client certificate, PEM, for services that require one."""
    tls_key: Path | None = None
    """Its key, PEM."""
    tls_server_name: str | None = None
    """Name to expect in the service's certificate, if not the target's."""
    token_file: Path | None = None
    """File whose only line is the bearer token."""

    @property
    def teachers(self) -> tuple[str, ...]:
        """Each replica of the teacher, once."""
        return tuple(dict.fromkeys(each.strip() for each in self.teacher.split(",") if each.strip()))

    @property
    def uses_tls(self) -> bool:
        """True if connections are encrypted."""
        return self.tls or any((self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name))

    def security(self) -> dict[str, Any]:
        """Returns a connection's arguments besides the target. Raises StillhouseError if the token file cannot be read."""
        return {
            "tls": self.tls,
            "tls_ca": self.tls_ca,
            "tls_cert": self.tls_cert,
            "tls_key": self.tls_key,
            "tls_server_name": self.tls_server_name,
            "token": self.token(),
        }

    def token(self) -> str | None:
        """Reads the bearer token. Raises StillhouseError if its file cannot be read."""
        if self.token_file is None:
            return None
        with file_errors("read the token in", self.token_file), self.token_file.open("rb") as file:
            content = file.read(MAX_TOKEN_BYTES + 1)
        token = content.decode("ascii", "replace").strip()
        if not token or len(content) > MAX_TOKEN_BYTES or not token.isprintable() or not token.isascii():
            raise usage_error(f"{self.token_file} must hold one line of ASCII, the token, and nothing else.")
        return token


NAMES = tuple(field.name for field in fields(Settings))
_TOP_LEVEL = {*NAMES, "context", "contexts"}


def default_config_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns `~/.config/stillhouse/config.toml`, or its place under XDG_CONFIG_HOME."""
    base = environment.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "stillhouse" / "config.toml"


def load_settings(
    flags: Mapping[str, str | None],
    *,
    context: str | None = None,
    config: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Settings:
    """Loads settings by precedence; `flags` maps names of Settings to values of the command line.

    The config file has the names of Settings at the top level, and again in `[contexts.NAME]`, which wins; `context`
    selects one unless --context or STILLHOUSE_CONTEXT does. Its paths are relative to the file.

    Raises StillhouseError for an unreadable file, an unknown name and an unknown context.
    """
    if config is None and (named := environment.get(ENVIRONMENT_PREFIX + "CONFIG")):
        config = Path(named).expanduser()
    context = context or environment.get(ENVIRONMENT_PREFIX + "CONTEXT") or None
    values = _from_file(config, context, environment)
    for name in NAMES:
        given = flags.get(name) or environment.get(ENVIRONMENT_PREFIX + name.upper())
        if given:
            values[name] = _typed(name, given)
    if bool(values.get("tls_cert")) != bool(values.get("tls_key")):
        raise usage_error("--tls-cert and --tls-key go together; give both or neither.")
    return Settings(**values)


def _from_file(config: Path | None, context: str | None, environment: Mapping[str, str]) -> dict[str, Any]:
    path = config or default_config_path(environment)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        if config is not None or not isinstance(error, FileNotFoundError):
            raise file_error("read", path, error) from error
        content = {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise usage_error(f"{path} is not valid TOML: {error}.") from error
    contexts = content.get("contexts", {})
    if not isinstance(contexts, dict):
        raise usage_error(f"{path}: contexts expects tables such as [contexts.lab].")
    values = _checked(path, "", {key: value for key, value in content.items() if key != "contexts"})
    context = context or values.pop("context", None)
    values.pop("context", None)
    if context is not None:
        if context not in contexts:
            known = ", ".join(sorted(contexts)) or "none"
            raise usage_error(f'there is no context "{context}"; {path} has: {known}.')
        values |= _checked(path, f"contexts.{context}.", contexts[context])
    return values


def _checked(path: Path, prefix: str, table: object) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise usage_error(f"{path}: {prefix.rstrip('.')} expects a table of settings.")
    known = _TOP_LEVEL if not prefix else set(NAMES)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=LEAST_SIMILARITY)
            hint = f'did you mean "{near[0]}"?' if near else f"there are: {', '.join(sorted(known))}."
            raise usage_error(f"{path}: there is no setting {prefix}{key}; {hint}")
        if key == "tls":
            if not isinstance(value, bool):
                raise usage_error(f"{path}: {prefix}tls expects true or false, not {value!r}.")
        elif not isinstance(value, str) or not value:
            raise usage_error(f"{path}: {prefix}{key} expects text in quotes, not {value!r}.")
        values[key] = path.parent / Path(value).expanduser() if key in _PATHS else value
    return values


def _typed(name: str, text: str) -> str | bool | Path:
    if name in _PATHS:
        return Path(text).expanduser()
    if name != "tls":
        return text
    if text.lower() not in _BOOLEANS:
        raise usage_error(f'{ENVIRONMENT_PREFIX}TLS expects true or false, not "{text}".')
    return _BOOLEANS[text.lower()]
