"""Tokens: only one that our issuer signed, for us, in its time, opens anything; everything else is None."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from contracts.failures import EncryptionError
from contracts.tenancy import TenantScope
from governance.tokens import LEEWAY_S, MAX_TOKEN_BYTES, TokenIssuer, key_of, read_claimed

NOW = datetime(2026, 1, 31, 12, 0, 0, 250_000, tzinfo=UTC)
PRIVATE = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
PUBLIC = PRIVATE.public_key().public_bytes_raw()
SECRET = b"local-development-secret-of-32-b!"
ACME = TenantScope("acme")


@pytest.fixture
def issuer() -> TokenIssuer:
    return TokenIssuer(private=PRIVATE.private_bytes_raw(), publics=[PUBLIC])


def b64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def unb64(value: str) -> bytes:
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))


def parts(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    header, payload, signature = token.split(".")
    return json.loads(unb64(header)), json.loads(unb64(payload)), unb64(signature)


def signed(
    header: dict[str, Any], claims: dict[str, Any] | bytes, sign: Callable[[bytes], bytes] = PRIVATE.sign
) -> str:
    """A token put together by hand, as an attacker or another library would."""
    body = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    head = f"{b64(json.dumps(header).encode())}.{b64(body)}"
    return f"{head}.{b64(sign(head.encode()))}"


def good(issuer: TokenIssuer) -> tuple[dict[str, Any], dict[str, Any]]:
    header, claims, _ = parts(issuer.issue("ana", ACME, NOW, 600, "j1"))
    return header, claims


def test_a_token_says_who_in_which_tenant_and_until_when(issuer: TokenIssuer) -> None:
    token = issuer.issue("ana", ACME, NOW, 600, "j1")
    claims = issuer.verify(token, NOW)
    assert claims is not None
    assert (claims.issuer, claims.subject, claims.tenant) == ("riskfleet", "ana", ACME)
    assert claims.issued_at == NOW.timestamp()
    assert parts(token)[0]["alg"] == "EdDSA"
    unbound = issuer.verify(issuer.issue("ana", None, NOW, 600, "j2"), NOW)
    assert unbound is not None
    assert unbound.tenant is None


def test_it_ends_at_its_expiry_within_the_clocks_leeway(issuer: TokenIssuer) -> None:
    token = issuer.issue("ana", None, NOW, 600, "j1")
    assert issuer.verify(token, NOW + timedelta(seconds=600 + LEEWAY_S)) is not None
    assert issuer.verify(token, NOW + timedelta(seconds=602 + LEEWAY_S)) is None


def test_a_token_from_the_future_is_refused(issuer: TokenIssuer) -> None:
    token = issuer.issue("ana", None, NOW, 600, "j1")
    assert issuer.verify(token, NOW - timedelta(seconds=LEEWAY_S - 1)) is not None
    assert issuer.verify(token, NOW - timedelta(seconds=LEEWAY_S + 1)) is None


def test_a_host_with_the_public_key_alone_verifies_and_cannot_issue(issuer: TokenIssuer) -> None:
    checker = TokenIssuer(publics=[PUBLIC])
    assert checker.verify(issuer.issue("ana", None, NOW, 600, "j1"), NOW) is not None
    assert not checker.can_issue
    with pytest.raises(EncryptionError):
        checker.issue("ana", None, NOW, 600, "j1")


def test_after_a_rotation_both_keys_are_good_and_a_foreign_one_is_not() -> None:
    other, foreign = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (2, 3))
    both = TokenIssuer(publics=[PUBLIC, other.public_key().public_bytes_raw()])
    for key, accepted in ((PRIVATE, True), (other, True), (foreign, False)):
        token = TokenIssuer(private=key.private_bytes_raw()).issue("ana", None, NOW, 600, "j1")
        assert (both.verify(token, NOW) is not None) is accepted


def test_the_library_s_deprecation_of_a_name_is_not_shown_to_operators(issuer: TokenIssuer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert issuer.verify(issuer.issue("ana", None, NOW, 600, "j1"), NOW) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"exp": None},
        {"iat": None},
        {"iss": None},
        {"aud": None},
        {"sub": None},
        {"exp": (NOW - timedelta(seconds=LEEWAY_S + 1)).timestamp()},
        {"exp": "9999999999"},
        {"exp": True},
        {"iat": (NOW + timedelta(seconds=LEEWAY_S + 1)).timestamp()},
        {"iat": [1]},
        {"nbf": (NOW + timedelta(seconds=LEEWAY_S + 1)).timestamp()},
        {"nbf": "now"},
        {"iss": "riskfleet2"},
        {"iss": ["riskfleet"]},
        {"aud": "another"},
        {"aud": ["another"]},
        {"aud": {"riskfleet": 1}},
        {"sub": ""},
        {"sub": 7},
        {"sub": "x" * 256},
        {"tenant": "Acme!"},
        {"tenant": ""},
        {"tenant": 7},
        {"tenant": ["acme"]},
    ],
    ids=str,
)
def test_claims_that_are_not_as_they_must_be_are_refused(issuer: TokenIssuer, change: dict[str, Any]) -> None:
    header, claims = good(issuer)
    changed = {name: value for name, value in (claims | change).items() if value is not None}
    assert issuer.verify(signed(header, claims), NOW) is not None
    assert issuer.verify(signed(header, changed), NOW) is None


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b"7", b"{", b'{"exp": NaN}', b"[" * 4_000, b"\xff"], ids=repr)
def test_a_signed_payload_that_is_no_object_is_refused(issuer: TokenIssuer, payload: bytes) -> None:
    assert issuer.verify(signed(good(issuer)[0], payload), NOW) is None


def hs256(key: bytes) -> Callable[[bytes], bytes]:
    return lambda message: hmac.new(key, message, hashlib.sha256).digest()


PEM = PRIVATE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize("key", [PUBLIC, PEM, PUBLIC.hex().encode(), b""], ids=["raw", "pem", "hex", "empty"])
def test_a_public_key_is_no_shared_secret(issuer: TokenIssuer, key: bytes) -> None:
    header, claims = good(issuer)
    assert issuer.verify(signed(header | {"alg": "HS256"}, claims, hs256(key)), NOW) is None


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "", None, 7, "HS256", "RS256", "ES256", "Ed448"])
def test_the_token_does_not_choose_the_algorithm(issuer: TokenIssuer, algorithm: object) -> None:
    header, claims = good(issuer)
    for sign in (PRIVATE.sign, lambda _: b""):
        assert issuer.verify(signed(header | {"alg": algorithm}, claims, sign), NOW) is None


@pytest.mark.parametrize(
    "extra",
    [{"crit": ["exp"]}, {"crit": []}, {"b64": False, "crit": ["b64"]}, {"b64": True}, {"x-unknown": 1}, {"kid": 7}],
    ids=str,
)
def test_extensions_of_the_header_are_refused(issuer: TokenIssuer, extra: dict[str, Any]) -> None:
    header, claims = good(issuer)
    assert issuer.verify(signed(header | extra, claims), NOW) is None


def test_a_key_that_the_token_brings_is_never_used(issuer: TokenIssuer) -> None:
    attacker = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": b64(attacker.public_key().public_bytes_raw())}
    header, claims = good(issuer)
    own_kid = TokenIssuer(private=attacker.private_bytes_raw())
    attacker_kid = parts(own_kid.issue("ana", None, NOW, 600, "j"))[0]["kid"]
    for brought in (
        {"jwk": jwk},
        {"jwk": jwk, "kid": attacker_kid},
        {"jku": "https://attacker.example/keys"},
        {"x5u": "https://attacker.example/cert"},
    ):
        assert issuer.verify(signed(header | brought, claims, attacker.sign), NOW) is None


def test_an_unknown_key_id_is_refused_and_none_is_good_while_there_is_one_key(issuer: TokenIssuer) -> None:
    header, claims = good(issuer)
    assert issuer.verify(signed(header | {"kid": "other"}, claims), NOW) is None
    plain = {"alg": "EdDSA"}
    assert issuer.verify(signed(plain, claims), NOW) is not None
    two = TokenIssuer(
        publics=[PUBLIC, Ed25519PrivateKey.from_private_bytes(b"\x02" * 32).public_key().public_bytes_raw()]
    )
    assert two.verify(signed(plain, claims), NOW) is None


def test_a_changed_byte_anywhere_is_refused(issuer: TokenIssuer) -> None:
    token = issuer.issue("ana", ACME, NOW, 600, "j1")
    header, payload, signature = token.split(".")
    _, claims, _ = parts(token)
    forged = b64(json.dumps(claims | {"sub": "root"}).encode())
    assert issuer.verify(f"{header}.{forged}.{signature}", NOW) is None
    assert issuer.verify(f"{header}.{payload}.{b64(unb64(signature)[:-1])}", NOW) is None
    assert issuer.verify(f"{header}.{payload}.", NOW) is None
    assert issuer.verify(f"{token}.x", NOW) is None


def test_an_oversized_token_is_refused_before_it_is_parsed(issuer: TokenIssuer) -> None:
    header, claims = good(issuer)
    large = signed(header, claims | {"pad": "x" * MAX_TOKEN_BYTES})
    assert len(large) > MAX_TOKEN_BYTES
    assert read_claimed(large) is None
    assert issuer.verify(large, NOW) is None
    assert read_claimed("." * 5_000_000) is None


@given(st.text(max_size=200) | st.from_regex(r"[A-Za-z0-9_-]{0,60}\.[A-Za-z0-9_-]{0,60}\.[A-Za-z0-9_-]{0,60}"))
def test_no_text_raises(text: str) -> None:
    issuer = TokenIssuer(publics=[PUBLIC])
    assert issuer.verify(text, NOW) is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_no_header_or_payload_raises(value: Any) -> None:
    issuer = TokenIssuer(publics=[PUBLIC])
    assert issuer.verify(signed(value, {"iss": "riskfleet"}), NOW) is None
    assert issuer.verify(signed({"alg": "EdDSA"}, json.dumps(value).encode()), NOW) is None


def test_with_a_shared_secret_only_hs256_is_accepted_and_without_it_only_eddsa(issuer: TokenIssuer) -> None:
    local = TokenIssuer(private=PRIVATE.private_bytes_raw(), publics=[PUBLIC], secret=SECRET)
    token = local.issue("ana", ACME, NOW, 600, "j1")
    assert parts(token)[0]["alg"] == "HS256"
    assert local.verify(token, NOW) is not None
    assert issuer.verify(token, NOW) is None
    assert local.verify(issuer.issue("ana", ACME, NOW, 600, "j1"), NOW) is None
    assert TokenIssuer(secret=b"another secret of thirty-two bytes").verify(token, NOW) is None


@pytest.mark.parametrize("given", [{}, {"secret": b"short"}, {"private": b"short"}, {"publics": [b"short"]}], ids=str)
def test_key_material_that_cannot_be_used_says_what_to_do(given: dict[str, Any]) -> None:
    with pytest.raises(EncryptionError) as raised:
        TokenIssuer(**given)
    assert "short" not in raised.value.detail


def test_only_strong_public_keys_of_known_types_verify() -> None:
    x = b64(PUBLIC)
    okp = {"kty": "OKP", "crv": "Ed25519", "x": x}
    found = key_of(okp)
    assert found is not None
    assert found.algorithms == ("EdDSA", "Ed25519")
    for refused in (
        {},
        {"kty": "oct", "k": b64(SECRET)},
        okp | {"use": "enc"},
        okp | {"alg": "HS256"},
        okp | {"alg": "RS256"},
        okp | {"crv": "X25519"},
        okp | {"x": "AA"},
        okp | {"x": 7},
        {"kty": "EC", "crv": "P-256", "x": x, "y": x},
        {"kty": "EC", "crv": "secp256k1", "x": x, "y": x},
        {"kty": "RSA", "n": b64((2**1023 + 1).to_bytes(128, "big")), "e": "AQAB"},
        {"kty": ["RSA"]},
    ):
        assert key_of(refused) is None, refused
