"""TLS and mutual TLS over loopback with generated certificates; refused combinations."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error
from stillhouse.protos.rpc.channel import ChannelOptions, connect
from stillhouse.protos.rpc.tls import ServerTls
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from tests.protos.rpc.serving import Told, make_server, serving, stub_of
from tests.support.networks.async_channel import connect_async
from tests.support.networks.certificates import Certificates, Pair, make_certificate, make_certificates

INFO = teacher_pb2.GetTeacherInfoRequest()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


async def ask(options: ChannelOptions) -> str:
    async with connect_async(options) as channel:
        return str((await stub_of(channel).GetTeacherInfo(INFO, timeout=60)).model)


async def refusal(options: ChannelOptions) -> StillhouseError:
    with pytest.raises(grpc.RpcError) as caught:
        await ask(options)
    return from_rpc_error(caught.value, target=options.target, service="teacher")


def tls_of(pair: Pair, client_ca: Path | None = None) -> ServerTls:
    return ServerTls(cert=pair.cert, key=pair.key, client_ca=client_ca)


async def test_tls_serves_async_and_blocking_callers_with_name_and_token(certificates: Certificates) -> None:
    servicer = Told()
    async with serving(servicer, tls=tls_of(certificates.server)) as address:
        options = ChannelOptions(
            target=address, ca=certificates.authority.cert, token="t0", client_name="lab"
        )
        assert await ask(options) == "m"
        assert servicer.metadata["authorization"] == "Bearer t0"

        def blocking() -> str:
            with connect(options) as channel:
                return str(stub_of(channel).GetTeacherInfo(INFO, timeout=60).model)

        assert await asyncio.to_thread(blocking) == "m"
        assert servicer.metadata["stillhouse-client"] == "lab"


async def test_an_unknown_authority_is_refused(certificates: Certificates) -> None:
    async with serving(Told(), tls=tls_of(certificates.server)) as address:
        error = await refusal(ChannelOptions(target=address, ca=certificates.stranger.cert))
        assert error.reason == Reason.TEACHER_UNREACHABLE
        assert "--tls-ca" in error.message
        assert (await refusal(ChannelOptions(target=address, tls=True))).reason == Reason.TEACHER_UNREACHABLE


async def test_a_certificate_of_another_name_needs_that_name(certificates: Certificates) -> None:
    async with serving(Told(), tls=tls_of(certificates.elsewhere)) as address:
        options = ChannelOptions(target=address, ca=certificates.authority.cert)
        assert (await refusal(options)).reason == Reason.TEACHER_UNREACHABLE
        named = ChannelOptions(target=address, ca=certificates.authority.cert, server_name="teacher.lab")
        assert await ask(named) == "m"


async def test_plaintext_to_tls_and_tls_to_plaintext_fail_with_a_remedy(certificates: Certificates) -> None:
    async with serving(Told(), tls=tls_of(certificates.server)) as address:
        assert "--tls-ca" in (await refusal(ChannelOptions(target=address))).message
    async with serving(Told()) as address:
        error = await refusal(ChannelOptions(target=address, ca=certificates.authority.cert))
        assert "must not have it" in error.message


async def test_mutual_tls_admits_only_callers_with_a_known_certificate(certificates: Certificates) -> None:
    tls = tls_of(certificates.server, client_ca=certificates.authority.cert)
    ca = certificates.authority.cert
    async with serving(Told(), tls=tls) as address:
        known, foreign = certificates.client, certificates.foreign_client
        assert await ask(ChannelOptions(target=address, ca=ca, cert=known.cert, key=known.key)) == "m"
        assert (await refusal(ChannelOptions(target=address, ca=ca))).reason == Reason.TEACHER_UNREACHABLE
        stranger = ChannelOptions(target=address, ca=ca, cert=foreign.cert, key=foreign.key)
        assert (await refusal(stranger)).reason == Reason.TEACHER_UNREACHABLE


async def test_tls_may_listen_beyond_loopback_if_callers_are_authenticated(
    certificates: Certificates,
) -> None:
    ca, client = certificates.authority.cert, certificates.client
    with pytest.raises(StillhouseError, match="anyone there could use this service") as caught:
        make_server(Told(), listen="0.0.0.0:0", tls=tls_of(certificates.server))
    assert caught.value.reason == Reason.INVALID_CONFIG
    server = make_server(Told(), listen="0.0.0.0:0", tls=tls_of(certificates.server, ca))
    address = (await server.start()).replace("0.0.0.0", "127.0.0.1")
    assert await ask(ChannelOptions(target=address, ca=ca, cert=client.cert, key=client.key)) == "m"
    await server.stop(0)


async def test_renewed_files_are_used_without_a_restart_and_broken_ones_are_not(
    certificates: Certificates, tmp_path: Path
) -> None:
    live = Pair(cert=tmp_path / "live.pem", key=tmp_path / "live.key")

    def install(pair: Pair) -> None:
        for source, target in ((pair.cert, live.cert), (pair.key, live.key)):
            shutil.copy(source, tmp_path / "next")
            (tmp_path / "next").replace(target)

    by_address = ChannelOptions(target="", ca=certificates.authority.cert)
    by_name = replace(by_address, server_name="teacher.lab")
    install(certificates.server)
    async with serving(Told(), tls=tls_of(live)) as address:
        by_address, by_name = replace(by_address, target=address), replace(by_name, target=address)
        async with connect_async(by_address) as old:
            assert (await stub_of(old).GetTeacherInfo(INFO, timeout=60)).model == "m"
            install(certificates.elsewhere)
            assert await ask(by_name) == "m"
            assert (await refusal(by_address)).reason == Reason.TEACHER_UNREACHABLE
            # An open connection continues.
            assert (await stub_of(old).GetTeacherInfo(INFO, timeout=60)).model == "m"
        live.key.write_text("no key")
        assert await ask(by_name) == "m"
        install(make_certificate(tmp_path, "later", certificates.authority, "IP:127.0.0.1"))
        assert await ask(by_address) == "m"


async def test_files_that_cannot_be_used_are_named(certificates: Certificates, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(StillhouseError, match=r"service's certificate .*missing\.pem cannot be read"):
        await make_server(Told(), tls=ServerTls(cert=missing, key=certificates.server.key)).start()
    with pytest.raises(StillhouseError, match=r"authority's certificate .*missing\.pem"):
        connect(ChannelOptions(target="127.0.0.1:1", ca=missing))
    with pytest.raises(StillhouseError, match="belong together"):
        connect(ChannelOptions(target="127.0.0.1:1", cert=certificates.client.cert))
    swapped = ServerTls(cert=certificates.server.key, key=certificates.server.cert)
    with pytest.raises(StillhouseError, match="TLS files do not match"):
        await make_server(Told(), tls=swapped).start()


def test_a_token_does_not_cross_a_network_in_plaintext() -> None:
    with pytest.raises(
        StillhouseError, match=r"A token would be sent to teacher\.lab:7401 in plaintext"
    ) as caught:
        connect(ChannelOptions(target="teacher.lab:7401", token="t0"))
    assert caught.value.reason == Reason.INVALID_CONFIG
