"""Settings of the web server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from stillhouse.client.core.errors import usage_error
from stillhouse.client.core.settings import Settings, default_config_path
from stillhouse.protos.rpc.channel import is_loopback

DEFAULT_LISTEN = "127.0.0.1:7400"
MAX_UPLOAD_BYTES = 64 * 2**30
BATCH_MAX_BYTES = 16 * 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class WebSettings:
    """Address, certificate and limits of the web server, and the services behind it."""

    services: Settings
    """Addresses and credentials of the services; its token and certificate are the server's own."""
    listen: str = DEFAULT_LISTEN
    """HOST:PORT; port 0 is any free one."""
    https_cert: Path | None = None
    https_key: Path | None = None
    insecure: bool = False
    """Listen beyond loopback without TLS."""
    hosts: tuple[str, ...] = ()
    """Names besides localhost under which browsers reach the server."""
    sign_in_file: Path | None = None
    """File with the line that signs in with the server's own credentials."""
    address_file: Path | None = None
    """Written with the URL once the server is ready."""
    max_upload_bytes: int = MAX_UPLOAD_BYTES
    batch_dir: Path | None = None
    """Folder of the files and batches of OpenAI's API; None keeps none."""
    batch_max_bytes: int = BATCH_MAX_BYTES
    """Limit on all files there."""
    parent: int | None = None
    """Process id of the parent; the server ends with it."""

    def __post_init__(self) -> None:
        """Raises StillhouseError(INVALID_REQUEST) for an address that cannot be used, or may not."""
        host, port = self.address
        if not host or not 0 <= port <= 65535:
            raise usage_error(f"--listen is {self.listen!r}; give HOST:PORT, such as {DEFAULT_LISTEN}.")
        if (self.https_cert is None) != (self.https_key is None):
            raise usage_error("--https-cert and --https-key go together; give both or neither.")
        if self.is_public and not self.https and not self.insecure:
            raise usage_error(
                f"{self.listen} is reachable from other machines, and tokens would cross the network in plaintext. Give "
                "--https-cert and --https-key, listen on 127.0.0.1, or accept it with --insecure."
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to bind; a port of -1 if there is none."""
        host, _, port = self.listen.rpartition(":")
        is_number = port.isascii() and port.isdecimal() and len(port) < 6
        return host.strip("[]"), int(port) if is_number else -1

    @property
    def https(self) -> bool:
        """True if the server speaks TLS."""
        return self.https_cert is not None

    @property
    def is_public(self) -> bool:
        """True if other machines may reach the server."""
        return not is_loopback(self.listen)

    @property
    def guarded(self) -> bool:
        """True if every caller must prove who he is: who reaches the server may reach more by it than without it.

        That is so for a public address, for a server with a token or certificate of its own, and for services on sockets in
        the file system, whose modes say who may connect.
        """
        own = self.services.token_file is not None or self.services.tls_cert is not None
        targets = (self.services.trainer, *self.services.teachers)
        return self.is_public or own or any(each.startswith("unix") for each in targets)

    @property
    def sign_in_path(self) -> Path:
        """The sign-in file, or its default place."""
        return self.sign_in_file or default_config_path().with_name("web-sign-in")

    @property
    def host_names(self) -> frozenset[str]:
        """Names, besides addresses, that a request's Host may have."""
        host = self.address[0].lower()
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return frozenset({"localhost", host, *(each.lower() for each in self.hosts)})
        return frozenset({"localhost", *(each.lower() for each in self.hosts)})
