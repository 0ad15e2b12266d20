"""Who calls: one port for API keys and tokens.

Promises: anything malformed, forged, expired or revoked is None, never an exception; what a person may do comes from
the installation's own tables, never from a token; a person disabled, or a grant taken away, is so within 5 s
everywhere. Failures of servers pass, since a caller whom nobody could check is not a wrong caller. Holds no cache:
those who read the tables do.
"""

from __future__ import annotations

from typing import Final, Protocol

from contracts.identity import EVERYWHERE, Person, Principal
from contracts.ports import Clock, Credentials
from contracts.tenancy import TenantScope
from governance.oidc import OidcIssuer
from governance.tokens import MAX_TOKEN_BYTES, TokenClaims, TokenIssuer, read_claimed, verify_token

_KEY_PREFIX: Final = "rfk_"


class PersonBook(Protocol):
    """Users and tenants; answers, the negative ones too, are at most 5 s old."""

    async def person(self, user_id: str) -> Person | None:
        """The user of that id."""
        ...

    async def person_of(self, issuer: str, subject: str) -> Person | None:
        """The user whom an OpenID Connect issuer knows as `subject`."""
        ...

    async def serves(self, scope: TenantScope) -> bool:
        """Whether the tenant exists and is not suspended."""
        ...


class Authenticator:
    """The port Credentials over API keys (`keys`), the installation's own tokens, and those of one OIDC issuer."""

    def __init__(
        self,
        keys: Credentials,
        people: PersonBook,
        tokens: TokenIssuer | None,
        clock: Clock,
        oidc: OidcIssuer | None = None,
    ) -> None:
        self._keys = keys
        self._people = people
        self._tokens = tokens
        self._clock = clock
        self._oidc = oidc

    async def principal(self, bearer: str) -> Principal | None:
        """The owner of an API key or token. Raises an InfrastructureError when a server does not answer."""
        if len(bearer) > MAX_TOKEN_BYTES:
            return None
        if bearer.startswith(_KEY_PREFIX):
            return await self._keys.principal(bearer)
        claimed = read_claimed(bearer)
        if claimed is None:
            return None
        if self._oidc is not None and claimed.issuer == self._oidc.issuer:
            return await self._foreign(bearer, claimed.key_id, self._oidc)
        claims = self._tokens.verify(bearer, self._clock.now()) if self._tokens else None
        return None if claims is None else await self._bound(await self._people.person(claims.subject), claims)

    async def _foreign(self, token: str, key_id: str | None, oidc: OidcIssuer) -> Principal | None:
        key = await oidc.key(key_id)
        claims = verify_token(token, key, oidc.issuer, oidc.audience, self._clock.now()) if key else None
        if claims is None:
            return None
        return await self._bound(await self._people.person_of(claims.issuer, claims.subject), claims)

    async def _bound(self, person: Person | None, claims: TokenClaims) -> Principal | None:
        """The person, narrowed to the tenant that the token is bound to."""
        if person is None or person.disabled:
            return None
        if person.tokens_valid_from is not None and claims.issued_at < person.tokens_valid_from.timestamp():
            return None
        scope = claims.tenant
        if scope is not None:
            places = {grant.tenant for grant in person.grants}
            if not places & {EVERYWHERE, scope.tenant_id} or not await self._people.serves(scope):
                return None
        return Principal(f"user:{person.user_id}", person.user_id, person.grants, scope)
