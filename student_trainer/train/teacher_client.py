"""The run's teacher: reached and checked before anything is trained, and again after every break, so that answers never mix.

Everything that can be wrong between student and teacher is refused here, in second 1 and not in step 1000.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from protos.errors import Reason, StillhouseError, from_rpc_error
from protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_LOG_PARTITIONS,
    CAPABILITY_QUERY_LOGPROBS,
    CAPABILITY_SAMPLED_TOKENS,
    GetTeacherInfoRequest,
    GetTeacherInfoResponse,
)
from protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from protos.transport import ChannelOptions, connect, process_name
from student_trainer.config import RunConfig, TeacherConfig
from student_trainer.config_contexts import losses, query_field
from student_trainer.config_loss import DRAWN_TARGETS
from student_trainer.run_dir import RunDir, write_whole
from student_trainer.train.corpus import Corpus
from student_trainer.train.patience import Patience
from student_trainer.train.prompts import Example
from student_trainer.train.vocabulary import Verdict, compare_with

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
    tokenizer_json: str
    """The student's tokenizer, which is compared with the teacher's where the fingerprints differ."""
    top_k: int
    """Largest that training and evaluation ask for."""
    top_k_field: str
    """Where it stands in the run file."""
    temperature: float | None
    """Temperature whose log-partition is needed; None if none is."""
    query_field: str
    """Place in the run file of a loss that needs query_logprobs; empty if none does."""
    draws_field: str
    """Place in the run file of a loss whose targets the teacher draws; empty if none has such."""
    longest: Example
    """The longest example."""
    largest: Example
    """The example with the largest token id."""

    @classmethod
    def of(
        cls, config: RunConfig, tokenizer_fingerprint: str, tokenizer_json: str, corpus: Corpus
    ) -> Demands:
        """The demands of `config`."""
        asked = {"evaluation.top_k": config.evaluation.top_k}
        tempered: list[float | None] = [None]
        drawn = [""]
        for path, loss in losses(config):
            if loss.asks_teacher:
                if loss.sparse_target in DRAWN_TARGETS:
                    drawn.append(f"{path}.sparse_target")
                asked[f"{path}.top_k"] = loss.top_k
                if loss.temperature != 1 and loss.temperature_mode == "exact":
                    tempered.append(loss.temperature)
        field = max(asked, key=lambda name: (asked[name], name != "evaluation.top_k"))
        return cls(
            tokenizer_fingerprint=tokenizer_fingerprint,
            tokenizer_json=tokenizer_json,
            top_k=asked[field],
            top_k_field=field,
            temperature=tempered[-1],
            query_field=query_field(config),
            draws_field=drawn[-1],
            longest=corpus.longest,
            largest=corpus.largest,
        )


class Teacher:
    """The services that serve one frozen model; `reach` finds one that answers."""

    def __init__(self, config: TeacherConfig, demands: Demands, run_dir: RunDir) -> None:
        self.config = config
        self._demands = demands
        self._run_dir = run_dir
        self._channels: dict[str, grpc.Channel] = {}
        self._identity = _read_identity(run_dir, config.name)
        self._lock = threading.Lock()
        self._verdicts: dict[str, Verdict] = {}
        self.shared_size = 0
        """Ids below it mean the same to the student and to the teacher that answered last."""
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
        with self._lock:  # several streams ask, each on a thread of its own
            return self._reach()

    def _reach(self) -> TeacherServiceStub:
        last: StillhouseError | None = None
        for target in self.config.targets:
            stub = TeacherServiceStub(self._channel(target))
            try:
                info = stub.GetTeacherInfo(GetTeacherInfoRequest(), timeout=INFO_TIMEOUT_S)
                shared_size = self._shared_size(stub, info, target)
            except grpc.RpcError as error:
                last = from_rpc_error(error, target=target, service="teacher")
                if not last.retryable:
                    raise last from error
                continue
            self._check(info, target)
            self.info, self.shared_size = info, shared_size
            return stub
        assert last is not None, "the configuration names at least one target"
        raise last

    @property
    def student_tokenizer(self) -> str:
        """Fingerprint of the tokenizer that the run's text is encoded with."""
        return self._demands.tokenizer_fingerprint

    def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _channel(self, target: str) -> grpc.Channel:
        if target not in self._channels:
            self._channels[target] = connect(_channel_options(self.config, target))
        return self._channels[target]

    def _shared_size(self, stub: TeacherServiceStub, info: GetTeacherInfoResponse, target: str) -> int:
        """Ids that mean the same to both. Raises grpc.RpcError, or StillhouseError(TOKENIZER_MISMATCH)."""
        key = info.tokenizer_fingerprint
        if key == self._demands.tokenizer_fingerprint:
            return info.tokenizer_size
        known = key in self._verdicts
        verdict = compare_with(stub, self._demands.tokenizer_json, self._verdicts, key)
        if verdict.kind == "foreign":
            raise foreign_tokenizer(self._demands.tokenizer_fingerprint, key, verdict.why, target)
        if not known:
            log.info("tokenizers differ at their ends alone", shared_size=verdict.shared_size, target=target)
        return min(verdict.shared_size, info.tokenizer_size)

    def _check(self, info: GetTeacherInfoResponse, target: str) -> None:
        check_demands(self._demands, info, target)
        identity = {
            "model_fingerprint": info.model_fingerprint,
            "adapter": self.config.adapter,
            "adapter_fingerprint": adapter_fingerprint(info, self.config.adapter, target),
        }
        if self._identity is None:
            _write_identity(self._run_dir, self.config.name, {**identity, "model": info.model})
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
    largest_id = int(demands.largest.token_ids.max())
    if largest_id >= info.tokenizer_size:
        raise StillhouseError(
            Reason.TOKENIZER_MISMATCH,
            f"{demands.largest.place} has token id {largest_id}, which the student's tokenizer added; the teacher at "
            f"{target} has ids below {info.tokenizer_size}. Leave such tokens out of the data, or use a teacher that knows them.",
            metadata={"value": str(largest_id), "limit": str(info.tokenizer_size)},
        )
    if demands.query_field and CAPABILITY_QUERY_LOGPROBS not in info.capabilities:
        raise StillhouseError(
            Reason.CAPABILITY,
            f"{demands.query_field} compares on the student's likeliest tokens, which needs query_logprobs; the engine of the "
            f"teacher at {target} ({info.engine}) does not give them. Set its divergence to reverse_kl and its estimator "
            "to policy_gradient, which every engine serves, or start the teacher with --engine hf.",
            metadata={"capability": "CAPABILITY_QUERY_LOGPROBS"},
        )
    if demands.draws_field and CAPABILITY_SAMPLED_TOKENS not in info.capabilities:
        raise StillhouseError(
            Reason.CAPABILITY,
            f"{demands.draws_field} has targets that the teacher draws, which the engine of the teacher at {target} "
            f"({info.engine}) does not do. Set it to tail_bucket, or start the teacher with --engine hf.",
            metadata={"capability": "CAPABILITY_SAMPLED_TOKENS"},
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
    longest = len(demands.longest.token_ids)
    if longest > info.max_sequence_tokens:
        raise StillhouseError(
            Reason.SEQUENCE_TOO_LONG,
            f"{demands.longest.place} has {longest} tokens; the teacher at {target} takes at most "
            f"{info.max_sequence_tokens}. Set data.max_sequence_tokens: {info.max_sequence_tokens}, or start the teacher "
            "with a larger --max-sequence-tokens.",
            metadata={"value": str(longest), "limit": str(info.max_sequence_tokens)},
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
        f'The teacher at {target} has no adapter "{adapter}"; loaded: {loaded}. Load it, or correct the adapter of this teacher in the run file.',
        resource=adapter,
    )


def backoff_s(attempt: int, error: StillhouseError | None = None) -> float:
    """Seconds to wait before try number `attempt` + 2: what the service asks for, else exponential with full jitter."""
    if error is not None and error.retry_after_s is not None:
        return error.retry_after_s
    return random.uniform(0.05, min(MAX_BACKOFF_S, 0.25 * 2.0 ** min(attempt, 10)))  # noqa: S311 - no secret


def foreign_tokenizer(student: str, teacher: str, why: str, target: str) -> StillhouseError:
    """The error that says so, and what to do."""
    return StillhouseError(
        Reason.TOKENIZER_MISMATCH,
        f"The student's tokenizer ({student}) is foreign to the one of the teacher at {target} ({teacher}), so their token "
        f"ids stand for different text: {why}. Use a student and a teacher of one model family, or copy the teacher's "
        "tokenizer to a student that is trained from_config. Approximate likelihood matching (ALM) bridges foreign "
        "tokenizers where loss.foreign_tokenizer: alm can be chosen.",
        metadata={"student": student, "teacher": teacher},
    )


def check_stored_identity(
    run_dir: RunDir, name: str, identity: Mapping[str, str], *, model: str, place: str
) -> None:
    """Return if the teacher whose answers `place` holds is the one that the run began with, which is kept.

    Raises:
        StillhouseError: TEACHER_CHANGED.
    """
    known = _read_identity(run_dir, name)
    if known is None:
        _write_identity(run_dir, name, {**identity, "model": model})
        return
    for part in ("model_fingerprint", "adapter_fingerprint"):
        if known[part] != identity[part]:
            raise StillhouseError(
                Reason.TEACHER_CHANGED,
                f"{place} holds answers of another teacher than the one that this run began with: its {part} is "
                f"{identity[part]}, and was {known[part]}. Name the cache of the former teacher, or create a new run.",
                metadata={"expected": known[part], "found": identity[part]},
            )


def _write_identity(run_dir: RunDir, name: str, identity: Mapping[str, str]) -> None:
    """Keeps who the teacher is; teachers with names stand beside each other."""
    content: dict[str, Any] = dict(identity)
    if name:
        with suppress(FileNotFoundError):
            content = json.loads(run_dir.teacher_path.read_bytes())
        content = (
            {**content, name: dict(identity)}
            if "model_fingerprint" not in content
            else {name: dict(identity)}
        )
    write_whole(run_dir.teacher_path, json.dumps(content).encode())


def _read_identity(run_dir: RunDir, name: str) -> dict[str, str] | None:
    try:
        value = json.loads(run_dir.teacher_path.read_bytes())
        if name:
            value = value.get(name)
            if value is None:
                return None
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
