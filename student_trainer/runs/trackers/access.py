"""Servers of trackers and their secrets: sections of the operator's credentials file, as environments of tracker processes."""

from __future__ import annotations

import importlib.util
import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stillhouse.protos.errors import FieldViolation, Reason, StillhouseError
from stillhouse.student_trainer.config.resources import TrackerConfig
from stillhouse.student_trainer.runs.supervision.training_process import (
    CREDENTIALS_VARIABLE,
    environment_of_child,
)

SECRETS_VARIABLE = "STILLHOUSE_TRACKER_SECRETS"
"""Names the variables with secrets; student_trainer/tracking/__main__.py reads it."""
_KEYS = frozenset({"tracker", "uri", "token_file", "user", "ca"})
_SECRETS = {
    "wandb": "WANDB_API_KEY",
    "mlflow": "MLFLOW_TRACKING_TOKEN",
    "trackio": "TRACKIO_WRITE_TOKEN",
    "swanlab": "SWANLAB_API_KEY",
}
_URIS = {
    "wandb": "WANDB_BASE_URL",
    "mlflow": "MLFLOW_TRACKING_URI",
    "trackio": "TRACKIO_SERVER_URL",
    "swanlab": "SWANLAB_API_HOST",
}
PUBLIC = frozenset({"wandb", "swanlab"})
"""Kinds that have a server of their own where a section names none."""
_OWN = ("WANDB_", "MLFLOW_", "TRACKIO_", "SWANLAB_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "DATABRICKS_")
"""Beginnings of variables that the libraries read: of these a process has what its section says, and no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """The server of a tracker."""

    name: str
    tracker: str
    uri: str = ""
    token_file: str = ""
    user: str = ""
    ca: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """The way to the server of one tracker."""

    variables: Mapping[str, str] = field(repr=False)
    """Environment of its process."""


class TrackerAccess:
    """Trackers that this service can use; a changed file counts from the next look-up on."""

    def __init__(self, credentials: Path) -> None:
        self._path = credentials

    def problem_of(self, tracker: TrackerConfig) -> FieldViolation | None:
        """The reason for which this service cannot use a tracker, with the name of its field."""
        if tracker.kind in _SECRETS and importlib.util.find_spec(tracker.kind) is None:
            return FieldViolation(
                "kind",
                f'the trainer\'s host has no {tracker.kind}; `pip install "stillhouse[trainer,{tracker.kind}]"` there, or '
                "leave this tracker out.",
            )
        try:
            self.environment_of(tracker)
        except StillhouseError as error:
            return error.violations[0]
        return None

    def environment_of(self, tracker: TrackerConfig) -> dict[str, str]:
        """The environment of a tracker's process. Raises StillhouseError(INVALID_SPEC) with one violation, of a field of it."""
        variables = {
            name: value for name, value in environment_of_child().items() if not name.startswith(_OWN)
        }
        variables.pop(CREDENTIALS_VARIABLE, None)
        variables |= {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if not tracker.is_online:
            return variables
        section = self._section(tracker)
        variables |= {_URIS[tracker.kind]: section.uri} if section.uri else {}
        if section.ca:
            variables |= {"SSL_CERT_FILE": section.ca, "REQUESTS_CA_BUNDLE": section.ca}
        secret = _secret_of(section)
        if secret:
            name = _SECRETS[tracker.kind]
            if tracker.kind == "mlflow" and section.user:
                name = "MLFLOW_TRACKING_PASSWORD"
                variables["MLFLOW_TRACKING_USERNAME"] = section.user
            variables |= {name: secret, SECRETS_VARIABLE: name}
        return variables

    def _section(self, tracker: TrackerConfig) -> _Section:
        sections = self._read()
        if not tracker.credential:
            for each in sections.values():
                if (each.tracker, each.uri) == (tracker.kind, tracker.uri):
                    return each
            raise _refused(
                "uri",
                f"this service sends nothing to {tracker.uri[:200]}; its operator names servers in credentials.toml, in sections "
                f'with tracker = "{tracker.kind}".',
            )
        section = sections.get(tracker.credential)
        if section is None or section.tracker != tracker.kind:
            raise _refused(
                "credential",
                f'credentials.toml in the trainer\'s data directory has no section [{tracker.credential}] with tracker = "{tracker.kind}".',
            )
        if tracker.uri not in ("", section.uri):
            raise _refused(
                "uri",
                f"the secret of {tracker.credential} goes to the server of its section alone; leave uri out.",
            )
        return section

    def _read(self) -> Mapping[str, _Section]:
        try:
            with self._path.open("rb") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                    raise _refused("credential", f"others can read {self._path.name}; run `chmod 600` on it.")
                document = tomllib.load(file)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise _refused("credential", f"{self._path.name} cannot be read ({error}).") from error
        named = {
            name: each for name, each in document.items() if isinstance(each, dict) and "tracker" in each
        }
        return {name: _section_of(name, each) for name, each in named.items()}


def _section_of(name: str, values: Mapping[str, Any]) -> _Section:
    """Raises StillhouseError for a section that cannot be used."""
    unknown = sorted(set(values) - _KEYS)
    if unknown or not all(isinstance(each, str) for each in values.values()):
        wrong = unknown[0] if unknown else "a value that is no text"
        raise _refused(
            "credential",
            f"[{name}] in credentials.toml has {wrong!r}; valid are {', '.join(sorted(_KEYS))}, all text.",
        )
    section = _Section(name=name, **values)
    if section.tracker not in _SECRETS:
        raise _refused(
            "credential",
            f"[{name}] in credentials.toml has tracker = {section.tracker!r}; valid are {', '.join(_SECRETS)}.",
        )
    parts = urlsplit(section.uri)
    if section.uri and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc):
        raise _refused(
            "credential",
            f"the uri of [{name}] in credentials.toml is no such address as https://tracker.example, without a user.",
        )
    if not section.uri and section.tracker not in PUBLIC:
        raise _refused(
            "credential", f"[{name}] in credentials.toml has no uri, the address of the tracker's server."
        )
    return section


def _secret_of(section: _Section) -> str:
    if not section.token_file:
        return ""
    try:
        secret = Path(section.token_file).read_text().strip()
    except (OSError, ValueError) as error:
        raise _refused(
            "credential", f"the token_file of [{section.name}] in credentials.toml cannot be read ({error})."
        ) from error
    if not secret or not secret.isprintable():
        raise _refused(
            "credential", f"the token_file of [{section.name}] in credentials.toml is not one line of text."
        )
    return secret


def _refused(name: str, sentence: str) -> StillhouseError:
    return StillhouseError(Reason.INVALID_SPEC, sentence, violations=[FieldViolation(name, sentence)])
