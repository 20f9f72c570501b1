"""Authorities and certificates made on the spot with the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    cert: Path
    key: Path


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_authority(directory: Path, name: str) -> Pair:
    pair = Pair(cert=directory / f"{name}.pem", key=directory / f"{name}.key")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *curve, "-keyout", pair.key, "-out", pair.cert, "-subj", f"/CN={name}")
    return pair


def make_certificate(directory: Path, name: str, authority: Pair, alternative: str) -> Pair:
    pair = Pair(cert=directory / f"{name}.pem", key=directory / f"{name}.key")
    request, extensions = directory / f"{name}.csr", directory / f"{name}.ext"
    extensions.write_text(f"subjectAltName={alternative}\n")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", *curve, "-keyout", pair.key, "-out", request, "-subj", f"/CN={name}")
    signer = ("-CA", authority.cert, "-CAkey", authority.key, "-CAcreateserial", "-extfile", extensions)
    openssl("x509", "-req", "-in", request, *signer, "-days", "2", "-out", pair.cert)
    return pair


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificates:
    authority: Pair
    stranger: Pair
    server: Pair
    elsewhere: Pair
    client: Pair
    foreign_client: Pair


def make_certificates(directory: Path) -> Certificates:
    """Everything that the tests of TLS need, in `directory`."""
    assert shutil.which("openssl"), (
        "the tests of TLS make their certificates with the openssl command; install it"
    )
    authority, stranger = make_authority(directory, "authority"), make_authority(directory, "stranger")
    return Certificates(
        authority=authority,
        stranger=stranger,
        server=make_certificate(directory, "server", authority, "IP:127.0.0.1"),
        elsewhere=make_certificate(directory, "elsewhere", authority, "DNS:teacher.lab"),
        client=make_certificate(directory, "client", authority, "DNS:trainer.lab"),
        foreign_client=make_certificate(directory, "foreign", stranger, "DNS:trainer.lab"),
    )
