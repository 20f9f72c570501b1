"""gRPC channels, blocking and async: keepalive, limits, retries, TLS and identity."""

import ipaddress
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.call_metadata import MetadataInterceptor
from stillhouse.protos.telemetry import tracing

MAX_MESSAGE_BYTES = 1024 * 1024
"""Largest message that Stillhouse sends."""
RECEIVE_LIMIT_BYTES = 32 * 1024 * 1024
"""Largest message that is received; above MAX_MESSAGE_BYTES for callers with their own client."""
FLUSH_BYTES = 512 * 1024
"""Size at which a stream flushes its batched responses."""
METADATA_LIMIT_BYTES = 64 * 1024
"""Room for a status with many field violations, which is sent in headers."""
CLIENT_NAME_KEY = "stillhouse-client"
KEEPALIVE_S = 30
KEEPALIVE_TIMEOUT_S = 10
KEEPALIVE_VARIABLE = "STILLHOUSE_KEEPALIVE_S"
"""Environment variable that overrides KEEPALIVE_S, for a NAT with a shorter timeout."""

# Idempotent calls only; CreateRun is one by its request_id. There is no waitForReady: a service that does not respond
# is reported at once, and callers that want to wait retry.
_IDEMPOTENT = {
    "stillhouse.v1.TeacherService": ("GetTeacherInfo", "LoadAdapter"),
    "stillhouse.v1.RunService": (
        "CreateRun",
        "GetRun",
        "ListRuns",
        "StopRun",
        "QueryMetrics",
        "ListArtifacts",
    ),
}
_RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    # A server forbids repeating a RESOURCE_EXHAUSTED that lasts, such as a full disk, by a negative pushback.
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": name}
                for service, names in _IDEMPOTENT.items()
                for name in names
            ],
            "retryPolicy": _RETRY_POLICY,
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelOptions:
    """Address of a service, TLS and identity."""

    target: str
    """`host:port` or `unix:PATH`."""
    tls: bool = False
    """TLS with the system's certificate authorities; implied by any of the next four."""
    ca: Path | None = None
    """Certificate authorities of the service's certificate."""
    cert: Path | None = None
    """Client certificate, for a service that requires one; needs key."""
    key: Path | None = None
    server_name: str | None = None
    """Expected name in the certificate, if not the target's."""
    token: str | None = None
    """Bearer token; sent in plaintext to this machine only."""
    client_name: str | None = None
    """Name of the client, for fair sharing and logs."""


def process_name(program: str) -> str:
    """A `client_name` unique to this process: services share capacity between client names."""
    host = socket.gethostname().encode("ascii", "replace").decode()
    return f"{program}/{host}/{os.getpid()}"


def connect(options: ChannelOptions | str) -> grpc.Channel:
    """A blocking channel; it connects with the first call.

    Raises StillhouseError(INVALID_CONFIG) for an unreadable certificate, a certificate without
    key or key without certificate, and a token that would cross a network in plaintext.
    """
    options = _as_options(options)
    metadata, arguments = call_metadata(options), _channel_arguments(options)
    if _uses_tls(options):
        channel = grpc.secure_channel(options.target, _credentials(options), options=arguments)
    else:
        channel = grpc.insecure_channel(options.target, options=arguments)
    return (
        grpc.intercept_channel(channel, MetadataInterceptor(metadata))
        if metadata or tracing.enabled()
        else channel
    )


def connect_async(options: ChannelOptions) -> grpc.aio.Channel:
    """An async channel of the running loop; each call gives `call_metadata` itself. Raises as `connect` does."""
    arguments = _channel_arguments(options)
    if _uses_tls(options):
        return grpc.aio.secure_channel(options.target, _credentials(options), options=arguments)
    return grpc.aio.insecure_channel(options.target, options=arguments)


def is_loopback(address: str) -> bool:
    """True if `host:port` or `unix:PATH` is not reachable from another machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may resolve to anything


def read_pem(path: Path, what: str) -> bytes:
    """The bytes of a key or certificate. Raises StillhouseError(INVALID_CONFIG) if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"{what} {path} cannot be read ({error.strerror}); give a PEM file that can.",
        ) from error


def _as_options(options: ChannelOptions | str) -> ChannelOptions:
    return ChannelOptions(target=options) if isinstance(options, str) else options


def _uses_tls(options: ChannelOptions) -> bool:
    return options.tls or any((options.ca, options.cert, options.key, options.server_name))


def _credentials(options: ChannelOptions) -> grpc.ChannelCredentials:
    if (options.cert is None) != (options.key is None):
        raise StillhouseError(
            Reason.INVALID_CONFIG, "A client certificate and its key belong together; give both or neither."
        )
    return grpc.ssl_channel_credentials(
        root_certificates=read_pem(options.ca, "The authority's certificate") if options.ca else None,
        private_key=read_pem(options.key, "The client's key") if options.key else None,
        certificate_chain=read_pem(options.cert, "The client's certificate") if options.cert else None,
    )


def call_metadata(options: ChannelOptions) -> tuple[tuple[str, str], ...]:
    """Identity for one call; raises StillhouseError(INVALID_CONFIG) for a token that would cross a network in plaintext."""
    if options.token and not _uses_tls(options) and not is_loopback(options.target):
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"A token would be sent to {options.target} in plaintext. Give the certificate authority for TLS, or no token.",
        )
    pairs = (
        ("authorization", f"Bearer {options.token}" if options.token else None),
        (CLIENT_NAME_KEY, options.client_name),
    )
    return tuple((key, value) for key, value in pairs if value)


def _keepalive_s() -> float:
    """Seconds, from the variable or by default. Raises StillhouseError(INVALID_CONFIG)."""
    text = os.environ.get(KEEPALIVE_VARIABLE, "")
    try:
        value = float(text or KEEPALIVE_S)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 3600:
        raise StillhouseError(
            Reason.INVALID_CONFIG, f"{KEEPALIVE_VARIABLE} is {text!r}; it must be seconds in [1, 3600]."
        )
    return value


def _channel_arguments(options: ChannelOptions) -> list[tuple[str, Any]]:
    arguments: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", RECEIVE_LIMIT_BYTES),
        ("grpc.max_send_message_length", RECEIVE_LIMIT_BYTES),
        ("grpc.max_metadata_size", METADATA_LIMIT_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * METADATA_LIMIT_BYTES),
        ("grpc.keepalive_time_ms", int(_keepalive_s() * 1000)),
        ("grpc.keepalive_timeout_ms", int(min(KEEPALIVE_TIMEOUT_S, _keepalive_s()) * 1000)),
        # For every ping, those that measure bandwidth included: a keepalive queues behind one in flight.
        ("grpc.http2.ping_timeout_ms", int(min(KEEPALIVE_TIMEOUT_S, _keepalive_s()) * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A restarted service is found within seconds; gRPC's default is two minutes.
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ]
    if is_loopback(options.target):
        arguments.append(("grpc.enable_http_proxy", 0))  # http_proxy is for other hosts
    if options.server_name:
        arguments.append(("grpc.ssl_target_name_override", options.server_name))
    return arguments
