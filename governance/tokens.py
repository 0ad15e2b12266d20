"""Tokens: signed statements of who somebody is (JWT, RFC 7519), made here and read from two kinds of issuer.

Promises (RFC 8725): the algorithm is fixed by the key that is used, never by the token; a key that a token brings or
points to (`jwk`, `jku`, `x5u`, `x5c`) is never looked at; `crit` is refused; size is checked before anything is
parsed; `exp`, `iat`, `iss`, `aud` and `sub` are required; what is malformed is None, never an exception. The
installation's own issuer signs with EdDSA, or in local development with one shared secret: never both. Says who the
subject is, not what the subject may do.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from joserfc import jws
from joserfc.errors import JoseError, UnsupportedAlgorithmError
from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry
from joserfc.registry import Header

from contracts.failures import EncryptionError, InvalidTenantError
from contracts.tenancy import TenantScope

ISSUER: Final = "riskfleet"
AUDIENCE: Final = "riskfleet"
MAX_TOKEN_BYTES: Final = 8_192
LEEWAY_S: Final = 30
_MIN_SECRET_BYTES: Final = 32  # RFC 7518, section 3.2: as long as the hash at least
_MIN_RSA_BITS: Final = 2048  # RFC 7518, section 3.3
_MAX_SUBJECT: Final = 255  # OpenID Connect Core, section 2
_ED25519: Final = ("EdDSA", "Ed25519")  # the second name is RFC 9864's
_MOMENTS: Final = (("exp", None), ("iat", None), ("nbf", 0))

_MALFORMED: Final = (
    JoseError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
    binascii.Error,
)


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a token says before anybody has verified it: good for choosing a key, and for nothing else."""

    issuer: str
    key_id: str | None
    algorithm: str


@dataclass(frozen=True, slots=True)
class TokenClaims:
    """What a verified token says. `issued_at` is seconds since 1970; `tenant` the one that it is bound to."""

    issuer: str
    subject: str
    issued_at: float
    tenant: TenantScope | None = None


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A key and the algorithms that go with its type."""

    key: Key
    algorithms: tuple[str, ...]


class _FixedAlgorithms(JWSRegistry):
    """Exactly the algorithms that were given: no defaults, no recommendations, no extensions of the header."""

    max_header_length = 4_096
    max_payload_length = MAX_TOKEN_BYTES

    def get_alg(self, name: str) -> Any:
        if not self.allowed or name not in self.allowed:
            raise UnsupportedAlgorithmError(f"{name} is not allowed here")
        return self.algorithms[name]

    def check_header(self, header: Header) -> None:
        if "crit" in header or "b64" in header:
            raise UnsupportedAlgorithmError("extensions of the header are not read here")
        super().check_header(header)


class TokenIssuer:
    """The installation's own issuer: makes and verifies. Without a private key or secret it only verifies.

    `publics` and `private` are raw Ed25519 keys (32 bytes each; the private key's public half is accepted too);
    `secret` is JWT_SECRET. With a secret only HS256 is accepted, without one only EdDSA. Raises EncryptionError for
    key material that cannot be used, or none at all.
    """

    def __init__(
        self, *, private: bytes | None = None, publics: Sequence[bytes] = (), secret: bytes | None = None
    ) -> None:
        if secret is not None:
            if len(secret) < _MIN_SECRET_BYTES:
                raise EncryptionError(f"JWT_SECRET has at least {_MIN_SECRET_BYTES} bytes; set a longer one")
            own: Key = _made(partial(OctKey.import_key, secret), "JWT_SECRET")
            self._signing: Key | None = own
            self._algorithm, keys = "HS256", [VerifyingKey(own, ("HS256",))]
        else:
            signing = None if private is None else _made(partial(_ed25519_private, private), "the token key")
            self._signing, self._algorithm = signing, "EdDSA"
            halves = [_made(partial(_ed25519_public, public), "a public token key") for public in publics]
            if signing is not None:
                halves.append(_ed25519_public(_public_half(signing)))
            keys = [VerifyingKey(half, _ED25519) for half in halves]
        if not keys:
            raise EncryptionError("no key to verify logins with; run 'riskfleet keys init' or set RISKFLEET_TOKEN_KEYS")
        self._keys = {key.key.thumbprint(): key for key in keys}

    @property
    def can_issue(self) -> bool:
        """Whether this process holds what it takes to make tokens."""
        return self._signing is not None

    def issue(self, subject: str, tenant: TenantScope | None, now: datetime, ttl_s: int, token_id: str) -> str:
        """A token for a user, `ttl_s` seconds long. Raises EncryptionError without a signing key."""
        if self._signing is None:
            raise EncryptionError("this process has no key to sign logins with; run 'riskfleet keys init'")
        issued_at = round(now.timestamp(), 6)  # finer than a second: a login right after logging out everywhere is good
        claims: dict[str, Any] = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": subject,
            "iat": issued_at,
            "exp": math.ceil(issued_at) + ttl_s,
            "jti": token_id,
        }
        if tenant is not None:
            claims["tenant"] = str(tenant)
        header = {"typ": "JWT", "alg": self._algorithm}
        if self._algorithm == "EdDSA":
            header["kid"] = self._signing.thumbprint()
        registry = _FixedAlgorithms(algorithms=[self._algorithm])
        return jws.serialize_compact(header, orjson.dumps(claims), self._signing, registry=registry)

    def verify(self, token: str, now: datetime) -> TokenClaims | None:
        """The claims of a token of this issuer; None when anything about it is not as it must be."""
        claimed = read_claimed(token)
        if claimed is None or claimed.issuer != ISSUER:
            return None
        key = self._keys.get(claimed.key_id) if claimed.key_id else None
        if claimed.key_id is None and len(self._keys) == 1:
            key = next(iter(self._keys.values()))
        if key is None:
            return None
        return verify_token(token, key, ISSUER, AUDIENCE, now, tenant_claim=True)


def read_claimed(token: str) -> Claimed | None:
    """What a token says of itself, unverified; None when it is not formed like one or too long."""
    if not 0 < len(token) <= MAX_TOKEN_BYTES or not token.isascii() or token.count(".") != 2:
        return None
    try:
        found = jws.extract_compact(token.encode(), registry=_FixedAlgorithms())
        header, claims = found.headers(), _object(found.payload)
        key_id, issuer, algorithm = header.get("kid"), claims.get("iss"), header["alg"]
    except _MALFORMED:
        return None
    if not isinstance(issuer, str) or not isinstance(algorithm, str) or not isinstance(key_id, str | None):
        return None
    return Claimed(issuer, key_id, algorithm)


def verify_token(
    token: str, key: VerifyingKey, issuer: str, audience: str, now: datetime, *, tenant_claim: bool = False
) -> TokenClaims | None:
    """The claims of a token that `key` signed for `audience`; None when anything is not as it must be.

    `tenant_claim`: whether this issuer may bind a token to a tenant; otherwise the claim is not looked at.
    """
    if len(token) > MAX_TOKEN_BYTES:
        return None
    try:
        found = jws.deserialize_compact(token, key.key, registry=_FixedAlgorithms(algorithms=key.algorithms))
        claims = _object(found.payload)
        if not _in_time(claims, now.timestamp()) or claims.get("iss") != issuer or not _meant_for(claims, audience):
            return None
        subject = claims.get("sub")
        if not isinstance(subject, str) or not 0 < len(subject) <= _MAX_SUBJECT:
            return None
        tenant = _tenant(claims) if tenant_claim else None
    except (*_MALFORMED, InvalidTenantError):
        return None
    return TokenClaims(issuer, subject, float(claims["iat"]), tenant)


def key_of(document: Mapping[str, Any]) -> VerifyingKey | None:
    """A key of an issuer's key set (RFC 7517) that may verify signatures; None for any other.

    RSA from 2,048 bits on: RS256 and PS256. EC on P-256: ES256. OKP on Ed25519: EdDSA. A key that names its
    algorithm is good for that one only.
    """
    if document.get("use", "sig") != "sig":
        return None
    public = {name: value for name, value in document.items() if name in ("kty", "n", "e", "crv", "x", "y")}
    try:
        key, algorithms = _typed(public)
    except _MALFORMED:
        return None
    named = document.get("alg")
    allowed = tuple(algorithm for algorithm in algorithms if named is None or algorithm == named)
    return VerifyingKey(key, allowed) if allowed else None


def _typed(public: dict[str, Any]) -> tuple[Key, tuple[str, ...]]:
    """Raises ValueError for a type that is not accepted. Asking for the public key is what builds and checks it."""
    match public.get("kty"), public.get("crv"):
        case "RSA", _:
            rsa = RSAKey.import_key(public)
            if rsa.public_key.key_size >= _MIN_RSA_BITS:
                return rsa, ("RS256", "PS256")
        case "EC", "P-256":
            curve = ECKey.import_key(public)
            if curve.public_key.key_size == 256:
                return curve, ("ES256",)
        case "OKP", "Ed25519":
            edwards = OKPKey.import_key(public)
            if isinstance(edwards.public_key, Ed25519PublicKey):
                return edwards, _ED25519
    raise ValueError("not a key that verifies here")


def _object(payload: bytes | None) -> dict[str, Any]:
    """orjson, not the standard library: it bounds depth, and takes neither NaN nor infinity."""
    document = orjson.loads(payload or b"")
    if not isinstance(document, dict):
        raise TypeError("claims are a JSON object")
    return document


def _in_time(claims: Mapping[str, Any], now: float) -> bool:
    expires, issued, begins = (_moment(claims.get(name, default)) for name, default in _MOMENTS)
    return expires > now - LEEWAY_S and issued <= now + LEEWAY_S and begins <= now + LEEWAY_S


def _moment(value: object) -> float:
    """Raises TypeError for what is not a NumericDate (RFC 7519, section 2)."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise TypeError("not a NumericDate")
    return float(value)


def _meant_for(claims: Mapping[str, Any], audience: str) -> bool:
    named = claims.get("aud")
    return named == audience or (isinstance(named, list) and audience in named)


def _tenant(claims: Mapping[str, Any]) -> TenantScope | None:
    named = claims.get("tenant")
    return None if named is None else TenantScope(named)


def _ed25519_private(raw: bytes) -> OKPKey:
    return OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(raw))


def _ed25519_public(raw: bytes) -> OKPKey:
    return OKPKey.import_key(Ed25519PublicKey.from_public_bytes(raw))


def _public_half(key: Key) -> bytes:
    native = key.public_key
    assert isinstance(native, Ed25519PublicKey)
    return native.public_bytes_raw()


def _made(make: Any, what: str) -> Any:
    try:
        return make()
    except _MALFORMED:
        raise EncryptionError(f"{what} cannot be used; see 'riskfleet keys init'") from None
