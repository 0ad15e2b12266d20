"""Keys of an OpenID Connect issuer, over a real socket: how often they are asked for, and what an outage changes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc import jws
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

from governance.oidc import IdentityProviderError, OidcIssuer, UnsafeIssuerError
from governance.tokens import verify_token
from tests.fakes import SteppingClock

KEYS: dict[str, Key] = {
    "rsa": RSAKey.import_key(rsa.generate_private_key(65_537, 2_048)),
    "ec": ECKey.import_key(ec.generate_private_key(ec.SECP256R1())),
    "okp": OKPKey.import_key(Ed25519PrivateKey.generate()),
}


def public(kid: str) -> dict[str, Any]:
    return dict(KEYS[kid].as_dict(private=False)) | {"kid": kid, "use": "sig"}


@dataclass
class Provider:
    """An identity provider that a test changes by hand; `asked` are the paths that it was asked for."""

    url: str = ""
    documents: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        self.asked.append(path)
        found = self.documents.get(path)
        if isinstance(found, tuple):
            return found
        return (404, b"", {}) if found is None else (200, json.dumps(found).encode(), {})

    def serve(self, *kids: str) -> None:
        self.documents = {
            "/.well-known/openid-configuration": {"issuer": self.url, "jwks_uri": f"{self.url}/keys"},
            "/keys": {"keys": [public(kid) for kid in kids]},
        }


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body, headers = made.answer(self.path)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def clock() -> SteppingClock:
    return SteppingClock()


@pytest.fixture
def issuer(provider: Provider, clock: SteppingClock) -> OidcIssuer:
    return OidcIssuer(provider.url, "fleet", clock)


def token(provider: Provider, clock: SteppingClock, kid: str, algorithm: str, **claims: Any) -> str:
    now = clock.now().timestamp()
    body = {"iss": provider.url, "aud": ["fleet"], "sub": "idp|7", "iat": now, "exp": now + 300} | claims
    header = {"alg": algorithm, "kid": kid}
    return jws.serialize_compact(header, json.dumps(body), KEYS[kid], registry=JWSRegistry(algorithms=[algorithm]))


@pytest.mark.parametrize(
    ("kid", "algorithm"), [("rsa", "RS256"), ("rsa", "PS256"), ("ec", "ES256"), ("okp", "EdDSA"), ("okp", "Ed25519")]
)
@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")
async def test_a_token_of_the_issuer_is_verified_by_its_published_key(
    provider: Provider, issuer: OidcIssuer, clock: SteppingClock, kid: str, algorithm: str
) -> None:
    provider.serve("rsa", "ec", "okp")
    key = await issuer.key(kid)
    assert key is not None
    good = token(provider, clock, kid, algorithm)
    claims = verify_token(good, key, provider.url, "fleet", clock.now(), tenant_claim=False)
    assert claims is not None
    assert claims.subject == "idp|7"
    assert verify_token(good, key, provider.url, "another", clock.now()) is None
    assert verify_token(good, key, "https://another.example", "fleet", clock.now()) is None
    bound = verify_token(token(provider, clock, kid, algorithm, tenant="acme"), key, provider.url, "fleet", clock.now())
    assert bound is not None
    assert bound.tenant is None
    assert await issuer.key("nobody") is None


async def test_a_key_is_good_for_the_algorithms_of_its_type_only(
    provider: Provider, issuer: OidcIssuer, clock: SteppingClock
) -> None:
    provider.serve("rsa", "ec")
    rsa_key = await issuer.key("rsa")
    assert rsa_key is not None
    for kid, algorithm in (("ec", "ES256"), ("rsa", "RS512"), ("okp", "Ed25519")):
        assert verify_token(token(provider, clock, kid, algorithm), rsa_key, provider.url, "fleet", clock.now()) is None


async def test_keys_are_asked_for_once_in_ten_minutes(
    provider: Provider, issuer: OidcIssuer, clock: SteppingClock
) -> None:
    provider.serve("rsa", "ec")
    assert provider.asked == []
    await asyncio.gather(*(issuer.key("rsa") for _ in range(20)))
    assert len(provider.asked) == 2
    clock.step(599)
    assert await issuer.key("ec") is not None
    assert len(provider.asked) == 2
    clock.step(1)
    provider.serve("rsa")
    assert await issuer.key("rsa") is not None
    assert len(provider.asked) == 4
    assert await issuer.key("ec") is None, "a withdrawn key opens nothing any more"


async def test_a_flood_of_unknown_key_ids_is_one_request_in_thirty_seconds(
    provider: Provider, issuer: OidcIssuer, clock: SteppingClock
) -> None:
    provider.serve("rsa")
    await issuer.key("rsa")
    clock.step(31)
    before = len(provider.asked)
    for _ in range(5):
        assert await asyncio.gather(*(issuer.key(f"forged-{i}") for i in range(50))) == [None] * 50
        clock.step(5)
    assert len(provider.asked) == before + 2
    clock.step(6)
    provider.serve("rsa", "ec")
    assert await issuer.key("ec") is not None, "a new key is found at the next request"


async def test_known_keys_go_on_through_an_outage_for_a_day_and_no_longer(
    provider: Provider, issuer: OidcIssuer, clock: SteppingClock
) -> None:
    provider.serve("rsa")
    assert await issuer.key("rsa") is not None
    provider.documents = {}
    clock.step(86_400)
    assert await issuer.key("rsa") is not None
    clock.step(1)
    with pytest.raises(IdentityProviderError):
        await issuer.key("rsa")
    clock.step(30)
    provider.serve("rsa")
    assert await issuer.key("rsa") is not None


async def test_before_its_first_answer_nobody_is_let_in_and_it_is_not_hammered(
    provider: Provider, issuer: OidcIssuer, clock: SteppingClock
) -> None:
    for _ in range(10):
        with pytest.raises(IdentityProviderError):
            await issuer.key("rsa")
    assert len(provider.asked) == 1
    clock.step(30)
    provider.serve("rsa")
    assert await issuer.key("rsa") is not None


@pytest.mark.parametrize(
    "break_it",
    [
        {"/keys": (200, b"not json", {})},
        {"/keys": (200, b"[]", {})},
        {"/keys": {"keys": "none"}},
        {"/keys": {"keys": []}},
        {"/keys": {"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "rsa"}]}},
        {"/keys": {"keys": [{}] * 101}},
        {"/keys": (200, b"[" + b" " * 300_000, {})},
        {"/keys": (302, b"", {"Location": "/elsewhere"})},
        {"/keys": (500, b"{}", {})},
        {"/.well-known/openid-configuration": {"issuer": "http://127.0.0.1:1", "jwks_uri": "x"}},
        {"/.well-known/openid-configuration": {}},
        {"/.well-known/openid-configuration": (200, b" " * 70_000, {})},
    ],
    ids=lambda case: repr(case)[:60],
)
async def test_an_answer_that_is_not_as_it_must_be_changes_nothing(
    provider: Provider, issuer: OidcIssuer, clock: SteppingClock, break_it: dict[str, Any]
) -> None:
    provider.serve("rsa")
    assert await issuer.key("rsa") is not None
    provider.documents |= break_it
    clock.step(700)
    before = len(provider.asked)
    assert await issuer.key("rsa") is not None
    assert await issuer.key("forged") is None
    assert before < len(provider.asked) <= before + 2
    assert "/elsewhere" not in provider.asked


async def test_one_bad_key_does_not_keep_out_its_neighbours(provider: Provider, issuer: OidcIssuer) -> None:
    provider.serve("rsa")
    bad: list[Any] = [7, {"kty": "RSA", "n": "!", "e": "AQAB", "kid": "bad"}, {"kty": "new"}, public("ec") | {"kid": 3}]
    provider.documents["/keys"]["keys"] = [*bad, public("rsa")]
    assert await issuer.key("rsa") is not None
    assert await issuer.key("bad") is None


async def test_without_a_key_id_the_only_key_is_meant(
    provider: Provider, issuer: OidcIssuer, clock: SteppingClock
) -> None:
    provider.serve("rsa")
    assert await issuer.key(None) is not None
    provider.serve("rsa", "ec")
    clock.step(700)
    assert await issuer.key(None) is None


async def test_the_keys_of_a_local_issuer_are_not_fetched_from_elsewhere_in_plain_text(
    provider: Provider, issuer: OidcIssuer
) -> None:
    provider.serve("rsa")
    provider.documents["/.well-known/openid-configuration"]["jwks_uri"] = "http://192.0.2.1/keys"
    with structlog.testing.capture_logs() as logs, pytest.raises(IdentityProviderError):
        await issuer.key("rsa")
    assert [line["exception_class"] for line in logs] == ["UnsafeIssuerError"]


@pytest.mark.parametrize(
    "url", ["http://idp.example", "ftp://idp.example", "idp.example", "", "http://127.0.0.1.example", "file:///keys"]
)
def test_only_https_is_spoken_except_to_this_machine(url: str, clock: SteppingClock) -> None:
    with pytest.raises(UnsafeIssuerError):
        OidcIssuer(url, "fleet", clock)
    for allowed in ("https://idp.example/realm", "http://localhost:8000", "http://127.0.0.7", "http://[::1]:1"):
        OidcIssuer(allowed, "fleet", clock)
