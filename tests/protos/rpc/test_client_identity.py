"""Identity of a client: proved names before claimed ones, hosts instead of connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from stillhouse.protos.rpc import auth
from stillhouse.protos.rpc.channel import process_name
from stillhouse.protos.rpc.client_identity import MAX_NAME_CHARS, client_of
from stillhouse.protos.telemetry.call_record import Caller


@dataclass
class Context:
    """Address and metadata of a call."""

    address: str = "ipv4:10.0.0.7:4242"
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    def peer(self) -> str:
        return self.address

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.metadata


@contextmanager
def caller(name: str) -> Iterator[None]:
    token = auth._caller.set(Caller(name=name, is_admin=False))
    try:
        yield
    finally:
        auth._caller.reset(token)


def test_a_proved_name_counts_before_a_claimed_one() -> None:
    claimed = Context(metadata=(("stillhouse-client", "lab"),))
    assert client_of(claimed) == "name:lab"
    with caller("lab"):
        assert client_of(claimed) == client_of(Context()) == "proved:lab"
    with caller("certificate:trainer.lab"):
        assert client_of(claimed) == "proved:certificate:trainer.lab"


def test_connections_of_one_host_are_one_client() -> None:
    assert client_of(Context()) == client_of(Context("ipv4:10.0.0.7:4243")) == "peer:ipv4:10.0.0.7"
    assert client_of(Context("ipv6:[::1]:99")) == "peer:ipv6:[::1]"
    assert client_of(Context("unix:")) == "peer:unix:"


def test_a_claimed_name_is_bounded_whatever_its_bytes() -> None:
    long = Context(metadata=(("stillhouse-client", b"\xff" * 1000),))
    assert len(client_of(long)) == len("name:") + MAX_NAME_CHARS


def test_process_names_are_unique() -> None:
    assert process_name("a") != process_name("b")
    assert process_name("a").isascii()
