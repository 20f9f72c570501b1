"""TLS certificates of a service, reloaded when their files change, without a restart or ending calls."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.channel import read_pem

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerTls:
    """PEM files of a TLS service."""

    cert: Path
    key: Path
    client_ca: Path | None = None
    """Requires client certificates signed by these authorities."""


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Server credentials that re-read changed files at each handshake.

    Raises:
        StillhouseError: INVALID_CONFIG if a file cannot be read, or certificate and key do not match.
    """
    certificates = _Certificates(tls)
    return grpc.dynamic_ssl_server_credentials(
        certificates.first,
        cast("Any", certificates.fetch),  # None means "as before", which its types leave out
        require_client_authentication=tls.client_ca is not None,
    )


class _Certificates:
    """Certificate source that gRPC calls at every handshake, from its own threads."""

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._seen = self._signature()
        self.first = self._read()

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """The certificates if they changed and are usable; None keeps the former ones."""
        signature = self._signature()
        if signature == self._seen:
            return None
        self._seen = signature
        try:
            changed = self._read()
        except (
            StillhouseError
        ) as error:  # half of a pair, perhaps; the other half changes the signature again
            log.warning("certificates kept", why=error.message)
            return None
        log.info("certificates read", cert=str(self._tls.cert))
        return changed

    def _read(self) -> grpc.ServerCertificateConfiguration:
        tls = self._tls
        key = read_pem(tls.key, "The service's key")
        cert = read_pem(tls.cert, "The service's certificate")
        authorities = read_pem(tls.client_ca, "The callers' authority") if tls.client_ca else None
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.cert, tls.key, password=lambda: "")
            if tls.client_ca is not None:
                context.load_verify_locations(tls.client_ca)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"The TLS files do not match each other, or are not PEM ({error}): certificate {tls.cert}, key {tls.key}. "
                "Give a chain and its key without a passphrase.",
            ) from error
        return grpc.ssl_server_certificate_configuration([(key, cert)], authorities)

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(
            _stat(path) for path in (self._tls.cert, self._tls.key, self._tls.client_ca) if path is not None
        )


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
