"""The run's teacher: reached and checked before anything is trained, and again after every break, so that answers never mix.

Everything that can be wrong between student and teacher is refused here, in second 1 and not in step 1000.
"""

from __future__ import annotations

import json
import os
import random
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from protos.errors import Reason, StillhouseError, from_rpc_error
from protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_LOG_PARTITIONS,
    GetTeacherInfoRequest,
    GetTeacherInfoResponse,
)
from protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from protos.transport import ChannelOptions, connect, process_name
from student_trainer.config import RunConfig, TeacherConfig
from student_trainer.run_dir import RunDir, write_whole
from student_trainer.train.patience import Patience

log = structlog.get_logger()

INFO_TIMEOUT_S = 5.0
"""Deadline of one GetTeacherInfo."""
FIRST_CONTACT_S = 15.0
"""A teacher that nobody has ever reached in this run is waited for so long; later ones for retry.teacher_wait_s."""
MAX_BACKOFF_S = 20.0
CREDENTIALS_VARIABLE = "STILLHOUSE_CREDENTIALS"
"""Path of the credentials file, which the run service passes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demands:
    """What the run asks of its teacher."""

    tokenizer_fingerprint: str
    """Of the student's tokenizer."""
    top_k: int
    """Largest that training and evaluation ask for."""
    top_k_field: str
    """Where it stands in the run file."""
    temperature: float | None
    """Temperature whose log-partition is needed; None if none is."""
    longest_tokens: int
    """Tokens of the longest example."""
    longest_place: str
    """File and row of it."""

    @classmethod
    def of(cls, config: RunConfig, tokenizer_fingerprint: str, longest_tokens: int, place: str) -> Demands:
        """The demands of `config`."""
        asked = {"evaluation.top_k": config.evaluation.top_k}
        if config.loss.asks_teacher:
            asked["loss.top_k"] = config.loss.top_k
        field = max(asked, key=lambda name: (asked[name], name == "loss.top_k"))
        tempered = config.loss.temperature != 1 and config.loss.temperature_mode == "exact"
        return cls(
            tokenizer_fingerprint=tokenizer_fingerprint,
            top_k=asked[field],
            top_k_field=field,
            temperature=config.loss.temperature if tempered and config.loss.asks_teacher else None,
            longest_tokens=longest_tokens,
            longest_place=place,
        )


class Teacher:
    """The services that serve one frozen model; `reach` finds one that answers."""

    def __init__(self, config: TeacherConfig, demands: Demands, run_dir: RunDir) -> None:
        self.config = config
        self._demands = demands
        self._run_dir = run_dir
        self._channels: dict[str, grpc.Channel] = {}
        self._identity = _read_identity(run_dir)
        self.info = GetTeacherInfoResponse()
        """Of the service that answered last."""

    def connect(self, patience: Patience) -> None:
        """Reach and check the teacher for the first time in this process.

        Raises:
            Stopped: the run shall stop.
            StillhouseError: TEACHER_UNREACHABLE, and all that `reach` raises.
        """
        known_before, since, attempt = self._identity is not None, time.monotonic(), 0
        while True:
            try:
                self.reach()
            except StillhouseError as error:
                if not error.retryable:
                    raise
                silent = error.reason is Reason.TEACHER_UNREACHABLE
                if silent and not known_before and time.monotonic() - since > FIRST_CONTACT_S:
                    raise
                patience.sleep(backoff_s(attempt, error), since, error.message)
                attempt += 1
            else:
                patience.clear()
                return

    def reach(self) -> TeacherServiceStub:
        """A service that answers and is the run's teacher; the first that is, in the order of `targets`.

        Raises StillhouseError: retryable if none answers; else TOKENIZER_MISMATCH, TEACHER_CHANGED, TOP_K_TOO_LARGE,
        SEQUENCE_TOO_LONG, CAPABILITY, ADAPTER_NOT_FOUND, or what a service says.
        """
        last: StillhouseError | None = None
        for target in self.config.targets:
            stub = TeacherServiceStub(self._channel(target))
            try:
                info = stub.GetTeacherInfo(GetTeacherInfoRequest(), timeout=INFO_TIMEOUT_S)
            except grpc.RpcError as error:
                last = from_rpc_error(error, target=target, service="teacher")
                if not last.retryable:
                    raise last from error
                continue
            self._check(info, target)
            self.info = info
            return stub
        assert last is not None, "the configuration names at least one target"
        raise last

    def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _channel(self, target: str) -> grpc.Channel:
        if target not in self._channels:
            self._channels[target] = connect(_channel_options(self.config, target))
        return self._channels[target]

    def _check(self, info: GetTeacherInfoResponse, target: str) -> None:
        check_demands(self._demands, info, target)
        identity = {
            "model_fingerprint": info.model_fingerprint,
            "adapter": self.config.adapter,
            "adapter_fingerprint": adapter_fingerprint(info, self.config.adapter, target),
        }
        if self._identity is None:
            write_whole(self._run_dir.teacher_path, json.dumps({**identity, "model": info.model}).encode())
            log.info("teacher reached", target=target, model=info.model, engine=info.engine)
            self._identity = identity
        for name in ("model_fingerprint", "adapter_fingerprint"):
            if self._identity[name] != identity[name]:
                raise StillhouseError(
                    Reason.TEACHER_CHANGED,
                    f"The teacher at {target} is not the one that this run began with: its {name} is {identity[name]}, "
                    f"and was {self._identity[name]}. Start the former teacher again, or create a new run for this one.",
                    metadata={"expected": self._identity[name], "found": identity[name], "target": target},
                )


def check_demands(demands: Demands, info: GetTeacherInfoResponse, target: str) -> None:
    """Return if a teacher can do what the run asks; raises what `Teacher.reach` lists, with limit and remedy."""
    if info.tokenizer_fingerprint != demands.tokenizer_fingerprint:
        raise StillhouseError(
            Reason.TOKENIZER_MISMATCH,
            f"The student's tokenizer ({demands.tokenizer_fingerprint}) is not the one of the teacher at {target} "
            f"({info.tokenizer_fingerprint}), so their token ids stand for different text. Use a student and a teacher "
            "of one model family, or copy the teacher's tokenizer to a student that is trained from_config.",
            metadata={"student": demands.tokenizer_fingerprint, "teacher": info.tokenizer_fingerprint},
        )
    if demands.top_k > info.max_top_k:
        raise StillhouseError(
            Reason.TOP_K_TOO_LARGE,
            f"{demands.top_k_field} is {demands.top_k}; the teacher at {target} gives at most {info.max_top_k}. "
            f"Lower it, or start the teacher with --max-top-k {demands.top_k}.",
            metadata={"value": str(demands.top_k), "limit": str(info.max_top_k)},
        )
    if demands.temperature is not None and CAPABILITY_LOG_PARTITIONS not in info.capabilities:
        raise StillhouseError(
            Reason.CAPABILITY,
            f"loss.temperature {demands.temperature:g} in mode exact needs log_partitions, which the engine of the teacher "
            f"at {target} ({info.engine}) does not give. Set loss.temperature_mode: conditional, or start the teacher "
            "with --engine hf.",
            metadata={"capability": "CAPABILITY_LOG_PARTITIONS"},
        )
    if demands.longest_tokens > info.max_sequence_tokens:
        raise StillhouseError(
            Reason.SEQUENCE_TOO_LONG,
            f"{demands.longest_place} has {demands.longest_tokens} tokens; the teacher at {target} takes at most "
            f"{info.max_sequence_tokens}. Set data.max_sequence_tokens: {info.max_sequence_tokens}, or start the teacher "
            "with a larger --max-sequence-tokens.",
            metadata={"value": str(demands.longest_tokens), "limit": str(info.max_sequence_tokens)},
        )


def adapter_fingerprint(info: GetTeacherInfoResponse, adapter: str, target: str) -> str:
    """Fingerprint of a loaded adapter; empty for the base model. Raises StillhouseError(ADAPTER_NOT_FOUND)."""
    if not adapter:
        return ""
    for each in info.adapters:
        if each.name == adapter:
            return each.fingerprint
    loaded = ", ".join(each.name for each in info.adapters) or "none"
    raise StillhouseError(
        Reason.ADAPTER_NOT_FOUND,
        f'The teacher at {target} has no adapter "{adapter}"; loaded: {loaded}. Load it, or correct teachers[0].adapter.',
        resource=adapter,
    )


def backoff_s(attempt: int, error: StillhouseError | None = None) -> float:
    """Seconds to wait before try number `attempt` + 2: what the service asks for, else exponential with full jitter."""
    if error is not None and error.retry_after_s is not None:
        return error.retry_after_s
    return random.uniform(0.05, min(MAX_BACKOFF_S, 0.25 * 2.0 ** min(attempt, 10)))  # noqa: S311 - no secret


def _read_identity(run_dir: RunDir) -> dict[str, str] | None:
    try:
        value = json.loads(run_dir.teacher_path.read_bytes())
        return {name: str(value[name]) for name in ("model_fingerprint", "adapter", "adapter_fingerprint")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StillhouseError(
            Reason.CHECKPOINT_CORRUPT,
            f"{run_dir.teacher_path} cannot be read ({error}). Delete it to accept the teacher that answers now.",
        ) from error


def _channel_options(config: TeacherConfig, target: str) -> ChannelOptions:
    section = _credential(config.credential) if config.credential else {}

    def path(name: str) -> Path | None:
        return Path(section[name]) if name in section else None

    token_file = path("token_file")
    try:
        token = token_file.read_text().strip() if token_file else None
    except OSError as error:
        raise _bad_credential(
            config.credential, f"token_file {token_file} cannot be read ({error})"
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


def _credential(name: str) -> Mapping[str, Any]:
    file = os.environ.get(CREDENTIALS_VARIABLE)
    if not file:
        raise _bad_credential(name, "the run service passed no credentials file")
    try:
        sections = tomllib.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise _bad_credential(name, f"{file} cannot be read ({error})") from error
    section = sections.get(name)
    if not isinstance(section, dict):
        raise _bad_credential(name, f"{file} has no section [{name}]; it has {', '.join(sections) or 'none'}")
    return section


def _bad_credential(name: str, problem: str) -> StillhouseError:
    return StillhouseError(
        Reason.INVALID_SPEC,
        f'teachers[0].credential is "{name}", but {problem}. Correct credentials.toml in the trainer\'s data directory.',
    )
