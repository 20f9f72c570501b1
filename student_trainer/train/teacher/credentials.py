"""Credentials of a training process: sections of the operator's file, whose token and certificate files may be replaced."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.channel import ChannelOptions, process_name
from stillhouse.student_trainer.config.teacher import TeacherConfig

CREDENTIALS_VARIABLE = "STILLHOUSE_CREDENTIALS"
"""Path of the credentials file, which the run service passes on."""

Signature = tuple[ChannelOptions, tuple[object, ...]]


def signature(config: TeacherConfig, target: str, *, field: str) -> Signature:
    """Returns the channel options for `target` at present, and the stamps of the files that they name.

    `field` is the credential's place in the run file.

    Raises:
        StillhouseError: INVALID_SPEC if the credential cannot be read.
    """
    options = _channel_options(config, target, field)
    return options, tuple(_stamp(path) for path in (options.ca, options.cert, options.key))


def _stamp(path: Path | None) -> object:
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return status and (status.st_ino, status.st_mtime_ns, status.st_size)


def _channel_options(config: TeacherConfig, target: str, field: str) -> ChannelOptions:
    section = _credential(config.credential, field) if config.credential else {}

    def path(name: str) -> Path | None:
        return Path(section[name]) if name in section else None

    token_file = path("token_file")
    try:
        token = token_file.read_text().strip() if token_file else None
    except (OSError, ValueError) as error:
        raise _bad_credential(
            config.credential, f"token_file {token_file} cannot be read ({error})", field
        ) from error
    return ChannelOptions(
        target=target,
        ca=path("ca"),
        cert=path("certificate"),
        key=path("key"),
        server_name=config.tls_server_name or None,
        token=token,
        client_name=process_name("stillhouse-trainer"),
    )


def _credential(name: str, field: str) -> Mapping[str, Any]:
    file = os.environ.get(CREDENTIALS_VARIABLE)
    if not file:
        raise _bad_credential(name, "the run service passed no credentials file", field)
    try:
        sections = tomllib.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise _bad_credential(name, f"{file} cannot be read ({error})", field) from error
    section = sections.get(name)
    if not isinstance(section, dict):
        raise _bad_credential(
            name, f"{file} has no section [{name}]; it has {', '.join(sections) or 'none'}", field
        )
    return section


def _bad_credential(name: str, problem: str, field: str) -> StillhouseError:
    return StillhouseError(
        Reason.INVALID_SPEC,
        f'{field} is "{name}", but {problem}. Correct credentials.toml in the trainer\'s data directory.',
    )
