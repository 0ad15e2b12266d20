"""Keys of an OpenID Connect issuer: discovered, cached, and asked for no more often than the rules below allow.

Promises (OpenID Connect Discovery 1.0): only https is spoken, except to this machine; the document's issuer is the
configured one; answers are bounded in size and time; keys are fresh for 10 minutes; an unknown key id, as a failed
request, leads to at most one request per 30 s, so a flood of forged tokens never becomes a flood of requests; while
the issuer does not answer, known keys go on for 24 hours, and then nobody comes in by them. Verifies nothing itself.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import orjson
import structlog

from contracts.failures import InfrastructureError
from contracts.ports import Clock
from governance.tokens import VerifyingKey, key_of

log = structlog.get_logger(__name__)

FRESH_S: Final = 600.0
BETWEEN_REQUESTS_S: Final = 30.0
OUTAGE_S: Final = 86_400.0
_TIMEOUT_S: Final = 5.0
_ALTOGETHER_S: Final = 8.0
_MAX_DOCUMENT: Final = 65_536
_MAX_KEY_SET: Final = 262_144
_MAX_KEYS: Final = 100


class IdentityProviderError(InfrastructureError):
    """The identity provider does not answer as it should, and no key of its is known; logins by it wait."""


class UnsafeIssuerError(InfrastructureError):
    """The identity provider is not reached by https; set RISKFLEET_OIDC_ISSUER to an https address."""


_UNREAD: Final = (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, TypeError, KeyError)


class OidcIssuer:
    """One issuer and the audience that its tokens must name. Nothing is connected before the first token.

    Raises UnsafeIssuerError unless `issuer` is https, or on this machine.
    """

    def __init__(self, issuer: str, audience: str, clock: Clock) -> None:
        _check_address(issuer, local=_is_local(issuer))
        self.issuer = issuer
        self.audience = audience
        self._clock = clock
        self._keys: Mapping[str | None, VerifyingKey] = {}
        self._read_at: float | None = None
        self._asked_at: float | None = None
        self._asking = asyncio.Lock()

    async def key(self, key_id: str | None) -> VerifyingKey | None:
        """The key of that id (None: the only key there is); None when the issuer has no such key.

        Raises IdentityProviderError while no keys are known and the issuer does not answer.
        """
        now = self._clock.monotonic()
        if not self._is_fresh(now) or self._find(key_id) is None:
            await self._ask(key_id)
        now = self._clock.monotonic()
        if self._read_at is None or now - self._read_at > OUTAGE_S:
            raise IdentityProviderError
        return self._find(key_id)

    def _find(self, key_id: str | None) -> VerifyingKey | None:
        if key_id is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(key_id)

    def _is_fresh(self, now: float) -> bool:
        return self._read_at is not None and now - self._read_at < FRESH_S

    async def _ask(self, key_id: str | None) -> None:
        """Read the keys again, unless somebody did so within 30 s or is doing so while a usable key is at hand."""
        if self._asking.locked() and self._find(key_id) is not None:
            return
        async with self._asking:
            now = self._clock.monotonic()
            if self._asked_at is not None and now - self._asked_at < BETWEEN_REQUESTS_S:
                return
            self._asked_at = now
            try:
                async with asyncio.timeout(_ALTOGETHER_S):
                    self._keys = await self._read()
            except (*_UNREAD, UnsafeIssuerError) as error:
                log.warning("oidc_keys_unread", exception_class=type(error).__name__)
                return
            self._read_at = self._clock.monotonic()

    async def _read(self) -> Mapping[str | None, VerifyingKey]:
        """Raises httpx.HTTPError, or ValueError, TypeError or KeyError for an answer that is not as it must be."""
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False) as client:
            about = await _fetch(
                client, self.issuer.rstrip("/") + "/.well-known/openid-configuration", limit=_MAX_DOCUMENT
            )
            if about["issuer"] != self.issuer:
                raise ValueError("the document is another issuer's")
            _check_address(about["jwks_uri"], local=_is_local(self.issuer))
            documents = (await _fetch(client, about["jwks_uri"], limit=_MAX_KEY_SET))["keys"]
        if not isinstance(documents, list) or len(documents) > _MAX_KEYS:
            raise ValueError("not a key set")
        found: dict[str | None, VerifyingKey] = {}
        for document in documents:
            key = key_of(document) if isinstance(document, Mapping) else None
            key_id = document.get("kid") if key else None
            if key is not None and (key_id is None or isinstance(key_id, str)):
                found[key_id] = key
        if not found:
            raise ValueError("the key set holds no key that verifies here")
        return found


async def _fetch(client: httpx.AsyncClient, url: str, *, limit: int) -> dict[str, Any]:
    async with client.stream("GET", url, headers={"Accept": "application/json"}) as response:
        if response.status_code != 200:
            raise ValueError("the issuer did not answer 200")
        body = bytearray()
        async for chunk in response.aiter_bytes(8_192):
            body += chunk
            if len(body) > limit:
                raise ValueError("the answer is too large")
    document = orjson.loads(bytes(body))
    if not isinstance(document, dict):
        raise TypeError("the answer is not a JSON object")
    return document


def _check_address(url: str, *, local: bool) -> None:
    """`local`: an issuer on this machine may speak http on this machine; nobody else may."""
    parts = urlsplit(url)
    plain = local and parts.scheme == "http" and _is_local(url)
    if not parts.hostname or not (parts.scheme == "https" or plain):
        raise UnsafeIssuerError


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
