"""Checks of `stillhouse doctor`: each yields its findings, with a remedy for a problem; none changes anything."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import ssl
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from stillhouse.client.core.settings import Settings
from stillhouse.client.teacher.teacher import Teacher
from stillhouse.client.trainer.trainer import Trainer
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.channel import is_loopback
from stillhouse.protos.telemetry.gpus import list_gpus
from stillhouse.protos.telemetry.host_memory import memory_bytes
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint

LEAST_FREE_BYTES = 10 * 2**30
EXPIRES_SOON_S = 14 * 86400
TIMEOUT_S = 10.0
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Variables that gRPC looks at, the first that is set."""
_SLOW_S = 1.0
_DAY_S = 86400


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Result of a check."""

    check: str
    state: Literal["ok", "warning", "failed"]
    found: str
    remedy: str = ""


def _judged(check: str, found: str, remedy: str) -> Finding:
    """A warning if there is a remedy, else ok."""
    return Finding(check=check, state="warning" if remedy else "ok", found=found, remedy=remedy)


def machine(data_dir: Path | None) -> Iterator[Finding]:
    """Checks versions, memory, devices and disk of this machine."""
    python = platform.python_version()
    yield Finding(check="client", state="ok", found=f"Stillhouse {own_version()}, Python {python}")
    total = memory_bytes()
    if total is not None:
        yield Finding(check="memory", state="ok", found=f"{total / 2**30:.0f} GiB")
    found = list_gpus()
    if not found:
        if shutil.which("nvidia-smi") is not None:
            remedy = (
                "nvidia-smi is installed but reports no device: run it to see why, and repair the driver."
            )
            yield Finding(check="GPU", state="failed", found="nvidia-smi lists none", remedy=remedy)
        else:
            yield _judged("GPU", "none; training and serving here would use the CPU", "")
    for each in found:
        free, total_gib = each.free_bytes / 2**30, each.total_bytes / 2**30
        text = f"{each.name}, {free:.0f} of {total_gib:.0f} GiB free, driver {each.driver}"
        busy = each.free_bytes < each.total_bytes / 10
        remedy = "Most of its memory is in use; `nvidia-smi` shows by which process." if busy else ""
        yield _judged(f"GPU {each.index}", text, remedy)
    yield _disk(data_dir)
    if data_dir is not None:
        yield from _secrets(data_dir)


def _disk(data_dir: Path | None) -> Finding:
    path = (data_dir or Path()).resolve()
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        found, remedy = f"{path}: {error.strerror}", "Give a directory that exists."
        return Finding(check="disk", state="failed", found=found, remedy=remedy)
    text = f"{usage.free / 2**30:.0f} of {usage.total / 2**30:.0f} GiB free at {path}"
    low = usage.free < LEAST_FREE_BYTES
    remedy = (
        "Delete old runs with `stillhouse run delete`, or start the trainer with --keep-ended-days."
        if low
        else ""
    )
    return _judged("disk", text, remedy)


def _secrets(data_dir: Path) -> Iterator[Finding]:
    for name in ("credentials.toml", "tokens.json"):
        path = data_dir / name
        if path.exists():
            open_to_others = stat.S_IMODE(path.stat().st_mode) & 0o077
            yield Finding(
                check=name,
                state="failed" if open_to_others else "ok",
                found="others on this host can read it" if open_to_others else "readable by its owner alone",
                remedy=f"chmod 600 {path}" if open_to_others else "",
            )


def certificates(settings: Settings) -> Iterator[Finding]:
    """Checks the validity of the certificates in the settings."""
    for name, path in (("authority", settings.tls_ca), ("own certificate", settings.tls_cert)):
        if path is not None:
            yield certificate(name, path)


def certificate(check: str, path: Path, now_s: float | None = None) -> Finding:
    """Checks the validity of the first certificate of a PEM file."""
    program = shutil.which("openssl")
    if program is None:
        remedy = "Install the openssl command to check certificates."
        return Finding(check=check, state="warning", found=f"{path} was not checked", remedy=remedy)
    command = [program, "x509", "-noout", "-startdate", "-enddate", "-subject", "-in", str(path)]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        fields = dict(line.split("=", 1) for line in output.stdout.splitlines())
        begins_s, ends_s = (ssl.cert_time_to_seconds(fields[name]) for name in ("notBefore", "notAfter"))
    except (OSError, ValueError, KeyError, subprocess.SubprocessError):
        remedy = "Give a readable PEM file."
        return Finding(check=check, state="failed", found=f"{path} is not a certificate", remedy=remedy)
    what = f"{path} ({fields.get('subject', '').strip()})"
    return _validity(check, what, begins_s, ends_s, time.time() if now_s is None else now_s)


def _validity(check: str, what: str, begins_s: float, ends_s: float, now_s: float) -> Finding:
    """Checks that a certificate is valid now and for a while."""
    days = (ends_s - now_s) / _DAY_S
    if now_s < begins_s:
        remedy = "Correct this machine's clock, or wait."
        return Finding(check=check, state="failed", found=f"{what} is not valid yet", remedy=remedy)
    if days <= 0:
        remedy = "Renew it; services read a renewed file without a restart."
        return Finding(
            check=check, state="failed", found=f"{what} expired {-days:.0f} days ago", remedy=remedy
        )
    soon = days * _DAY_S < EXPIRES_SOON_S
    remedy = "Renew it soon; services read a renewed file without a restart." if soon else ""
    return _judged(check, f"{what}, valid for {days:.0f} days", remedy)


def _served_certificate(check: str, target: str, settings: Settings) -> Iterator[Finding]:
    """Checks the certificate that a service presents; yields nothing without one, or if the service does not respond."""
    if not settings.uses_tls or target.startswith("unix"):
        return
    check = f"{check}'s certificate"
    host, _, port = target.rpartition(":")
    host = host.strip("[]")
    try:
        context = ssl.create_default_context(cafile=settings.tls_ca)
        context.set_alpn_protocols(["h2"])
        if settings.tls_cert and settings.tls_key:
            context.load_cert_chain(settings.tls_cert, settings.tls_key)
        with (
            socket.create_connection((host, int(port)), TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=settings.tls_server_name or host) as secured,
        ):
            served: Any = secured.getpeercert()
    except ssl.SSLCertVerificationError as error:
        remedy = "Renew it if it has expired; else give --tls-ca the authority that signed it, or --tls-server-name."
        found = f"{target} presents one that is not accepted: {error.verify_message}"
        yield Finding(check=check, state="failed", found=found, remedy=remedy)
    except (OSError, ValueError):
        return
    else:
        begins_s, ends_s = (ssl.cert_time_to_seconds(served[name]) for name in ("notBefore", "notAfter"))
        yield _validity(check, f"certificate of {target}", begins_s, ends_s, time.time())


def teacher(settings: Settings, student: Path | None) -> Iterator[Finding]:
    """Checks each replica of the teacher: response time, version and tokenizer."""
    for target in settings.teachers:
        yield from _exposure("teacher", target, settings)
        yield from proxy("teacher", target)
        yield from _served_certificate("teacher", target, settings)
        with Teacher(target, **settings.security(), timeout_s=TIMEOUT_S) as service:
            began_s = time.monotonic()
            info, problem = _query("teacher", service.info)
            if info is None:
                yield problem
                continue
            took_s = time.monotonic() - began_s
            text = (
                f"{info.model} at {target} responds in {1000 * took_s:.0f} ms ({info.engine}, {info.dtype})"
            )
            slow = took_s > _SLOW_S
            remedy = "It is overloaded or far away; prefetch hides some of that." if slow else ""
            yield _judged("teacher", text, remedy)
            yield _versions("teacher", info.service_version)
            if student is not None:
                files, problem = _query("tokenizers", service.tokenizer)
                yield problem if files is None else _tokenizers(student, files)


def trainer(settings: Settings) -> Iterator[Finding]:
    """Checks the trainer's response, version and runs."""
    from stillhouse.protos.stillhouse.v1 import run_pb2

    yield from _exposure("trainer", settings.trainer, settings)
    yield from proxy("trainer", settings.trainer)
    yield from _served_certificate("trainer", settings.trainer, settings)
    with Trainer(settings.trainer, **settings.security(), timeout_s=TIMEOUT_S) as service:
        request = run_pb2.ListRunsRequest(page_size=100)
        page, problem = _query("trainer", lambda: service.call(service.stub.ListRuns, request))
        if page is None:
            yield problem
            return
        run = run_pb2.Run
        live = {run.STATE_STARTING, run.STATE_RUNNING, run.STATE_STOPPING}
        working = [each for each in page.runs if each.state in live]
        waiting = sum(each.state == run.STATE_PENDING for each in page.runs)
        text = f"{settings.trainer} responds: {len(working)} live and {waiting} pending among the newest 100 runs"
        yield Finding(check="trainer", state="ok", found=text)
        if page.runs:
            yield _versions("trainer", page.runs[0].created_by_version)
        conditions = Counter(each.condition for each in working)
        if stuck := conditions[run.CONDITION_WAITING_FOR_TEACHER]:
            found = f"{stuck} wait for a teacher that does not respond"
            remedy = "Start that teacher; `stillhouse run show` names its address under teachers."
            yield _judged("trainer's runs", found, remedy)
        if silent := conditions[run.CONDITION_NOT_RESPONDING]:
            found = f"the processes of {silent} send no heartbeat"
            remedy = "Check on the trainer's host whether its disk, its devices or the processes hang."
            yield _judged("trainer's runs", found, remedy)


def _query(check: str, request: Callable[[], Any]) -> tuple[Any, Finding]:
    try:
        response = request()
    except StillhouseError as error:
        remedies = {
            Reason.TEACHER_LOADING: "Wait until it has loaded.",
            Reason.UNAUTHENTICATED: "Give a token with --token-file.",
            Reason.PERMISSION_DENIED: "Use a token with this scope.",
        }
        remedy = remedies.get(error.reason, "")
        if error.reason is Reason.TEACHER_LOADING:
            return None, _judged(check, error.message, remedy)
        return None, Finding(check=check, state="failed", found=error.message, remedy=remedy)
    return response, Finding(check=check, state="ok", found="")


def _exposure(check: str, target: str, settings: Settings) -> Iterator[Finding]:
    if not is_loopback(target) and not settings.uses_tls:
        found = f"{target} is on another host, and nothing is encrypted"
        yield _judged(check, found, "Give the service --tls-cert and --tls-key, and this client --tls-ca.")


def proxy(check: str, target: str, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Reports the HTTP proxy that calls to `target` pass, by gRPC's rules: variables in small letters, ends of names."""
    variable = next((each for each in _PROXIES if environment.get(each)), None)
    if variable is None or is_loopback(target):
        return
    excluded = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
    host = target.rpartition(":")[0].strip("[]")
    if any(host.endswith(each.strip()) for each in excluded.split(",") if each.strip()):
        return
    address = environment[variable].rpartition("@")[2]
    found = f"calls to {target} go through the proxy {address.removeprefix('http://')} of {variable}"
    yield _judged(
        f"{check}'s proxy", found, f"If that is not meant: export no_proxy={host}, in small letters."
    )


def _versions(check: str, theirs: str) -> Finding:
    ours = own_version()
    if theirs.split(".")[:2] == ours.split(".")[:2]:
        return _judged(f"{check}'s version", theirs, "")
    found = f"{theirs}, and this client is {ours}"
    return _judged(f"{check}'s version", found, "Bring both to the same version.")


def _tokenizers(student: Path, theirs: Mapping[str, bytes]) -> Finding:
    """Checks that the student's ids stand for the same tokens as the teacher's."""
    check = "tokenizers"
    try:
        own = _fingerprint({"tokenizer.json": (student / "tokenizer.json").read_bytes()})
        teacher = _fingerprint(theirs)
    except (OSError, StillhouseError, ValueError, KeyError) as error:
        found = f"{student} has no tokenizer.json" if isinstance(error, OSError) else str(error)
        remedy = "Give a model directory with a tokenizer of the tokenizers library."
        return Finding(check=check, state="failed", found=found, remedy=remedy)
    if own == teacher:
        return Finding(check=check, state="ok", found="the student's tokens and merges are the teacher's")
    return Finding(
        check=check,
        state="failed",
        found=f"the student's tokens and merges ({own[:12]}) are not the teacher's ({teacher[:12]})",
        remedy="Their ids stand for different text. Use a student of the teacher's family, or copy the teacher's with "
        "`stillhouse teacher tokenizer` to a student that is trained from_config; or set loss.foreign_tokenizer: alm in the "
        "run, which compares chunks of text.",
    )


def _fingerprint(files: Mapping[str, bytes]) -> str:
    """Fingerprints ids, tokens and merges. Pre-tokenization depends on the loading library; a run compares that too."""
    document = json.loads(files["tokenizer.json"])
    if not isinstance(document, dict):
        raise KeyError("tokenizer.json")
    bare = {name: part for name, part in document.items() if name in ("model", "added_tokens")}
    return tokenizer_fingerprint(json.dumps(bare), {})


def own_version() -> str:
    """Returns the version of this installation."""
    try:
        return version("stillhouse")
    except PackageNotFoundError:  # run from a checkout
        return "0.0.0"
