"""Rights of callers of the web server, and what a page of another site may not do."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from stillhouse.client.core.settings import Settings
from stillhouse.client.web.api import messages
from stillhouse.client.web.api.sessions import MAX_SIGN_IN_BYTES
from stillhouse.client.web.security.rates import RateLimit
from stillhouse.client.web.security.sessions import COOKIE
from stillhouse.client.web.security.sign_in_file import read_or_make
from stillhouse.client.web.settings import WebSettings
from stillhouse.protos.errors import Reason, StillhouseError
from tests.client.web.conftest import World, start_web
from tests.support.networks.certificates import make_certificates
from tests.support.processes import no_process_left
from tests.support.programs import start_trainer


def test_a_callers_token_is_what_the_services_see(world: World) -> None:
    with world.client("ada") as ada, world.client("eve") as eve, world.client("root") as root:
        run = ada.post("/api/v1/runs", json={"spec": world.spec()}).headers["location"]
        assert eve.get(run).status_code == 200
        refused = eve.post(f"{run}:stop")
        assert (refused.status_code, refused.json()["reason"]) == (403, "PERMISSION_DENIED")
        assert "eve" in refused.json()["detail"]
        assert root.post(f"{run}:stop").status_code in (200, 409)
    with world.client("asker") as asker:
        assert asker.get("/api/v1/runs").json()["reason"] == "PERMISSION_DENIED"
    with world.client("") as nobody:
        for path in ("/api/v1/runs", "/api/v1/rows:inspect", "/model-distillation/tasks"):
            unread = nobody.post(path, content=b"[" * 300_000, headers={"content-type": "application/json"})
            assert unread.status_code == 401
        refused = nobody.get("/api/v1/runs")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        for header in ("Bearer sth_aaaaaaaa_wrong", "Basic YTpi", "Bearer", "Bearer \xe9"):
            assert (
                nobody.get("/api/v1/runs", headers=[(b"authorization", header.encode("latin-1"))]).status_code
                == 401
            )


def test_a_session_needs_its_csrf_token_to_change_something(world: World) -> None:
    with world.client("") as browser:
        assert browser.post("/api/v1/session", json={"token": "sth_aaaaaaaa_wrong"}).status_code == 401
        assert browser.post("/api/v1/session", json={"token": "a" * MAX_SIGN_IN_BYTES}).status_code == 413
        signed_in = browser.post("/api/v1/session", json={"token": world.tokens["ada"]})
        assert signed_in.status_code == 201, signed_in.text
        cookie = signed_in.headers["set-cookie"]
        assert re.search("HttpOnly", cookie)
        assert re.search("SameSite=strict", cookie)
        assert world.tokens["ada"] not in cookie + signed_in.text
        csrf = signed_in.json()["csrf_token"]
        assert browser.get("/api/v1/session").json() == signed_in.json()
        assert signed_in.json()["access"]["trainer"] == "allowed"
        spec = {"spec": world.spec()}
        assert browser.post("/api/v1/runs", json=spec).json()["reason"] == "PERMISSION_DENIED"
        wrong = browser.post("/api/v1/runs", json=spec, headers={"x-csrf-token": csrf + "x"})
        assert wrong.status_code == 403
        assert browser.post("/api/v1/runs", json=spec, headers={"x-csrf-token": csrf}).status_code == 201
        assert browser.delete("/api/v1/session").status_code == 403
        kept = dict(browser.cookies)
        assert browser.delete("/api/v1/session", headers={"x-csrf-token": csrf}).status_code == 204
        assert httpx.get(f"{world.web.target}/api/v1/runs", cookies=kept).status_code == 401


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {"host": "evil.example"}, 403),
        ("GET", {"host": "evil.example:7400"}, 403),
        ("GET", {"host": ""}, 403),
        ("GET", {"host": "localhost:1"}, 200),
        ("GET", {"host": "[::1]:7400"}, 200),
        ("POST", {"origin": "https://evil.example"}, 403),
        ("POST", {"origin": "null"}, 403),
        ("POST", {"origin": "http://127.0.0.1:1"}, 403),
        ("POST", {"sec-fetch-site": "cross-site"}, 403),
        ("POST", {"sec-fetch-site": "same-site"}, 403),
        ("POST", {"sec-fetch-site": "same-origin"}, 201),
        ("POST", {"content-type": "text/plain"}, 400),
    ],
)
def test_other_sites_get_nothing(world: World, method: str, headers: dict[str, str], status: int) -> None:
    with world.client("ada") as client:
        path = "/api/v1/runs"
        kwargs = {} if method == "GET" else {"json": {"spec": world.spec()}}
        assert client.request(method, path, headers=headers, **kwargs).status_code == status  # type: ignore[arg-type]


def test_every_response_is_locked_down_and_no_token_is_logged(world: World) -> None:
    with world.client("ada") as client:
        for path in ("/healthz", "/api/v1/runs", "/api/v1/nothing", "/api/v1/openapi.json"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
            assert "access-control-allow-origin" not in headers
        client.get("/api/v1/runs", params={"page_token": "secret-in-a-query"})
    log = world.web.log(1_000_000)
    assert "/api/v1/runs" in log
    assert "secret-in-a-query" not in log
    assert not [name for name, token in world.tokens.items() if token in log]


def test_a_server_with_a_token_of_its_own_serves_nobody_without_one(world: World) -> None:
    own = world.root / "own.token"
    own.write_text(world.tokens["root"])
    sign_in = world.root / "sign-in"
    options = ("--token-file", str(own), "--sign-in-file", str(sign_in))
    with (
        no_process_left() as mark,
        start_web(world.root / "own", world.trainer.target, *options, environment=mark) as web,
    ):
        url = f"{web.target}/api/v1"
        assert httpx.get(f"{url}/runs").status_code == 401
        wrong = {"authorization": "Bearer sth_aaaaaaaa_wrong"}
        for path in ("teachers", "session"):
            assert httpx.get(f"{url}/{path}", headers=wrong).status_code == 401
        assert httpx.get(f"{url}/teachers").status_code == 401
        line = sign_in.read_text().strip()
        assert sign_in.stat().st_mode & 0o077 == 0
        assert httpx.get(f"{url}/runs", headers={"authorization": f"Bearer {line}"}).status_code == 200
        ada = {"authorization": f"Bearer {world.tokens['ada']}"}
        for path in ("runs", "teachers", "session"):
            assert httpx.get(f"{url}/{path}", headers=ada).status_code == 200
        session = httpx.post(f"{url}/session", json={"token": line})
        assert session.json()["kind"] == "server"
        assert httpx.get(f"{url}/runs", cookies=session.cookies).status_code == 200
        with httpx.Client(base_url=url) as stranger:
            tries = [stranger.get("/runs", headers={"authorization": "Bearer x"}) for _ in range(40)]
            assert 429 in [each.status_code for each in tries]
            cookie = f"{COOKIE}={session.cookies[COOKIE]}"
            renewed = stranger.post("/session", json={"token": line}, headers={"cookie": cookie})
            assert renewed.status_code == 201
        assert httpx.get(f"{url}/runs", cookies=session.cookies).status_code == 401
        assert httpx.get(f"{url}/runs", cookies=renewed.cookies).status_code == 200
        assert line not in web.log(1_000_000)
        assert world.tokens["root"] not in web.log(1_000_000)
        assert web.stop() == 0


def test_a_certificate_of_the_server_is_for_those_who_sign_in(tmp_path: Path) -> None:
    """The run service knows its callers by certificate alone, so that every token would do."""
    made = make_certificates(tmp_path)
    server, client, ca = made.server, made.client, str(made.authority.cert)
    options = ["--tls-cert", str(server.cert), "--tls-key", str(server.key), "--tls-client-ca", ca]
    options += ["--web", "--web-listen", "127.0.0.1:0"]
    own = {"TLS_CA": ca, "TLS_CERT": str(client.cert), "TLS_KEY": str(client.key)}
    environment = {f"STILLHOUSE_{name}": value for name, value in own.items()}
    data = tmp_path / "data"
    with (
        no_process_left() as mark,
        start_trainer(data, directory=tmp_path, options=options, environment={**mark, **environment}),
        httpx.Client(verify=ssl.create_default_context(cafile=ca)) as caller,
    ):
        url = f"{(data / 'web.address').read_text()}/api/v1"
        assert url.startswith("https://")
        assert caller.get(f"{url}/runs").status_code == 401
        for wrong in ("sth_aaaaaaaa_wrong", "anything"):
            refused = caller.get(f"{url}/runs", headers={"authorization": f"Bearer {wrong}"})
            assert (refused.status_code, refused.json()["reason"]) == (401, "UNAUTHENTICATED")
            assert caller.post(f"{url}/session", json={"token": wrong}).status_code == 401
        line = (data / "web-sign-in").read_text().strip()
        signed_in = caller.post(f"{url}/session", json={"token": line})
        assert signed_in.headers["set-cookie"].startswith("__Host-stillhouse_session=")
        assert "; Secure" in signed_in.headers["set-cookie"]
        assert caller.get(f"{url}/runs").json()["runs"] == []
        assert "max-age" in signed_in.headers["strict-transport-security"]
        with pytest.raises(httpx.HTTPError):
            httpx.get(url.replace("https:", "http:"))


def test_a_public_address_needs_tls(tmp_path: Path) -> None:
    services = Settings()
    with pytest.raises(StillhouseError, match="--https-cert"):
        WebSettings(services=services, listen="0.0.0.0:7400")
    public = WebSettings(services=services, listen="0.0.0.0:7400", insecure=True)
    assert public.guarded
    assert not WebSettings(services=services).guarded
    assert WebSettings(services=Settings(trainer="unix:/run/trainer")).guarded
    assert WebSettings(services=Settings(tls_cert=tmp_path, tls_key=tmp_path)).guarded
    shared = tmp_path / "sign-in"
    line = read_or_make(shared)
    assert read_or_make(shared) == line
    shared.chmod(0o644)
    with pytest.raises(StillhouseError, match="chmod 600"):
        read_or_make(shared)


async def test_a_body_that_stops_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "IDLE_S", 0.01)
    parts = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> MutableMapping[str, Any]:
        return parts.pop() if parts else await asyncio.Event().wait()  # type: ignore[return-value]

    with pytest.raises(StillhouseError) as stopped:
        await messages.read_body(Request({"type": "http", "headers": []}, receive))
    assert stopped.value.reason is Reason.CALL_TIMEOUT


def test_a_rate_is_kept_for_each_client() -> None:
    limit = RateLimit("requests", per_s=0.001, burst=2)
    for client in ("a", "a", "b"):
        limit.take(client)
    with pytest.raises(StillhouseError) as refused:
        limit.take("a")
    assert refused.value.reason is Reason.TOO_MANY_CALLS
    assert refused.value.retry_after_s
    limit.take("b")
