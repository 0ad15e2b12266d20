"""Tenants and API keys in memory.

Answers are never older than the last change: what the server's adapter remembers for seconds is read afresh here.
Keys are whatever text they are given as; a hash of it is kept, so a dump of the tables shows none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from contracts.failures import InvalidMetadataError, InvalidTenantError
from contracts.identity import Grant, Principal, Role
from contracts.limits import NO_LIMITS, TenantLimits
from contracts.ports import TenantProfile
from contracts.state import Thresholds
from contracts.tenancy import TenantScope
from governance.access import parse_api_key
from governance.memory.database import MemoryDatabase, Table, Transaction


@dataclass(frozen=True, slots=True)
class StoredTenant:
    """A row of `tenants`."""

    tenant_id: str
    name: str
    broker_user: str | None
    thresholds: Thresholds
    status: str = "active"
    approval_policy: Mapping[str, Any] = field(default_factory=dict)
    limits: TenantLimits = NO_LIMITS


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A row of `api_keys`; `secret` is the SHA-256 of the whole key. Its tenant is the principal's, if any."""

    secret: str
    principal: Principal
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


# Read before a tenant is known, as on the server: no tenant of a transaction hides their rows.
TENANTS: Final[Table[StoredTenant]] = Table(
    "tenants",
    key=lambda row: (row.tenant_id,),
    unique={"broker user": lambda row: None if row.broker_user is None else (row.broker_user,)},
)
API_KEYS: Final[Table[StoredKey]] = Table("api_keys", key=lambda row: (row.secret,))


class MemoryDirectory:
    """The ports Directory and Credentials (API keys only) on a database in memory.

    What changes it is called directly: it is the embedded mode's way in, and the tests'.
    """

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    async def principal(self, bearer: str) -> Principal | None:
        """The owner of an API key; None when it is unknown, expired, revoked, or its tenant is not active."""
        now = self._database.clock.now()

        def work(tx: Transaction) -> Principal | None:
            stored = tx.get(API_KEYS, _hash(bearer))
            if stored is None or stored.revoked_at is not None:
                return None
            if stored.expires_at is not None and stored.expires_at <= now:
                return None
            scope = stored.principal.scope
            tenant = None if scope is None else tx.get(TENANTS, scope.tenant_id)
            served = scope is None or (tenant is not None and tenant.status == "active")
            return stored.principal if served else None

        return await self._database.run((), work)

    async def tenants(self) -> Sequence[TenantProfile]:
        """Every tenant, suspended ones too, in order of its id."""
        rows = sorted(await self._database.run((), lambda tx: tx.rows(TENANTS)), key=lambda row: row.tenant_id)
        return tuple(
            TenantProfile(TenantScope(row.tenant_id), row.name, row.broker_user, row.thresholds, row.limits)
            for row in rows
        )

    async def serves(self, scope: TenantScope) -> bool:
        """Whether the tenant exists and is not suspended."""
        row = await self._database.run((), lambda tx: tx.get(TENANTS, scope.tenant_id))
        return row is not None and row.status == "active"

    def create_tenant(
        self,
        scope: TenantScope,
        name: str,
        broker_user: str | None = None,
        thresholds: Thresholds | None = None,
        approval_policy: Mapping[str, Any] | None = None,
    ) -> bool:
        """Make a tenant; False when it is there already, which changes nothing.

        Raises InvalidMetadataError when the broker user belongs to another tenant.
        """
        row = StoredTenant(
            scope.tenant_id, name, broker_user, thresholds or Thresholds(), "active", approval_policy or {}
        )

        def work(tx: Transaction) -> bool:
            if tx.get(TENANTS, scope.tenant_id) is not None:
                return False
            if not tx.insert(TENANTS, row):
                raise InvalidMetadataError(f"the broker user of tenant {scope} belongs to another tenant")
            return True

        return self._database.apply([scope], work)

    def set_status(self, scope: TenantScope, status: str) -> None:
        """Make a tenant "active" or "suspended", which shuts its keys out. Raises InvalidTenantError."""

        def work(tx: Transaction) -> None:
            tx.put(TENANTS, replace(_known(tx, scope), status=status))

        self._database.apply([scope], work)

    def set_limits(self, scope: TenantScope, limits: TenantLimits) -> None:
        """What the tenant may hand in from now on. Raises InvalidTenantError."""

        def work(tx: Transaction) -> None:
            tx.put(TENANTS, replace(_known(tx, scope), limits=limits))

        self._database.apply([scope], work)

    def create_api_key(
        self,
        scope: TenantScope,
        key: str,
        role: Role = Role.SERVICE,
        owner: str = "",
        expires_at: datetime | None = None,
    ) -> Principal:
        """Let a key in as this role in this tenant; returns whom it names. Raises InvalidTenantError."""
        presented = parse_api_key(key)
        name = presented.key_id if presented else key[:8]
        principal = Principal(f"key:{name}", owner, frozenset({Grant(scope.tenant_id, role)}), scope)
        self._database.apply([scope], lambda tx: _known(tx, scope))
        self.admit(key, principal, expires_at)
        return principal

    def admit(self, bearer: str, principal: Principal, expires_at: datetime | None = None) -> None:
        """Let a bearer in as anybody, a user too; one that is bound to a tenant only while that is active."""
        row = StoredKey(_hash(bearer), principal, expires_at)
        self._database.apply((), lambda tx: tx.put(API_KEYS, row))

    def revoke_api_key(self, key: str) -> None:
        """Shut a key out; one that is unknown is no error."""
        now = self._database.clock.now()

        def work(tx: Transaction) -> None:
            stored = tx.get(API_KEYS, _hash(key))
            if stored is not None:
                tx.put(API_KEYS, replace(stored, revoked_at=now))

        self._database.apply((), work)


def _known(tx: Transaction, scope: TenantScope) -> StoredTenant:
    stored = tx.get(TENANTS, scope.tenant_id)
    if stored is None:
        raise InvalidTenantError(f"there is no tenant {scope}; create it first")
    return stored


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
