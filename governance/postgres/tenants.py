"""Tenants and their API keys: every command in one transaction with its audit record in the outbox.

Promises: a secret is in the answer to the command that made it and nowhere else; a tenant whose making was cut off
does not exist, and making it again completes it; a tenant's thresholds get a new version with every change, since
decisions name it. A key belongs to its tenant: it goes on when its owner is disabled, and the list says so; it stops
within 5 s of its revocation, and exactly at its expiry.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from contracts.events import pointers_of
from contracts.failures import (
    ConflictError,
    InvalidRequestError,
    InvalidTenantError,
    MessagingFailureError,
    NotKnownError,
)
from contracts.identity import EVERYWHERE, Permission, Principal, Role
from contracts.limits import TenantLimits
from contracts.state import Thresholds
from contracts.tenancy import TenantScope
from governance.access import KEY_BYTES, new_api_key
from governance.approvals import ApprovalPolicy
from governance.postgres.commands import Broker, PeoplePolicy, PeoplePorts, need, why
from governance.postgres.engine import transaction

MAX_OVERLAP_S: Final = 7 * 86_400
MAX_KEYS: Final = 100
MAX_KEYS_SHOWN: Final = 500
"""More than may live, so that no living key is ever hidden behind dead ones."""
_BROKER_S: Final = 4.0
"""Within PostgreSQL's idle_in_transaction_session_timeout (5 s): the row's lock is held meanwhile."""
_AMOUNT: Final = re.compile(r"[0-9]{1,15}(\.[0-9]{1,8})?")
_KEY_ID: Final = re.compile(r"rfk_[0-9a-f]{12}")
_MAKING_LOCK: Final = 1_918_859_008


class Tenant(BaseModel):
    """A tenant as its administrators see it."""

    model_config = ConfigDict(frozen=True)
    tenant: str
    name: str
    status: Literal["active", "suspended"]
    broker_user: str | None
    thresholds: Thresholds
    approval_policy: ApprovalPolicy
    limits: TenantLimits
    created_at: datetime


class MadeKey(BaseModel):
    """A new API key; the only moment in which its secret is known."""

    model_config = ConfigDict(frozen=True)
    api_key: str = Field(repr=False)
    key_id: str
    expires_at: datetime | None


class MadeTenant(BaseModel):
    """A new tenant with its secrets, to be shown once."""

    model_config = ConfigDict(frozen=True)
    tenant: Tenant
    key: MadeKey
    broker_password: str = Field(repr=False)


class ApiKey(BaseModel):
    """An API key without its secret. `owner` is who made it ("" for the demo key)."""

    model_config = ConfigDict(frozen=True)
    key_id: str
    role: Role
    label: str
    owner: str
    owner_disabled: bool
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to change of a tenant: fields by name; a section or field that is not named stays as it is."""

    thresholds: Mapping[str, Any] | None = None
    approval_policy: Mapping[str, Any] | None = None
    limits: Mapping[str, Any] | None = None


_MAKING: Final = text("SELECT pg_advisory_xact_lock(:space, hashtext(:tenant))")
_INSERT: Final = text(
    """
    INSERT INTO tenants (tenant_id, name, broker_user, thresholds, approval_policy, limits)
    VALUES (:tenant, :name, :broker_user, CAST(:thresholds AS jsonb), CAST(:approval_policy AS jsonb),
            CAST(:limits AS jsonb))
    """
)
_UPDATE: Final = text(
    """
    UPDATE tenants SET thresholds = CAST(:thresholds AS jsonb), approval_policy = CAST(:approval_policy AS jsonb),
                       limits = CAST(:limits AS jsonb)
     WHERE tenant_id = :tenant
    """
)
_STATUS: Final = text("UPDATE tenants SET status = :status WHERE tenant_id = :tenant")
_SHOW: Final = text("SELECT * FROM tenants WHERE tenant_id = :tenant")
_LOCK: Final = text("SELECT * FROM tenants WHERE tenant_id = :tenant FOR UPDATE")
_LIST: Final = text(
    """
    SELECT * FROM tenants WHERE (:all OR tenant_id = ANY(CAST(:tenants AS text[]))) AND tenant_id > :after
     ORDER BY tenant_id LIMIT :limit
    """
)
_INSERT_KEY: Final = text(
    """
    INSERT INTO api_keys (key_id, tenant, mac, role, owner, label, expires_at, created_at)
    VALUES (:key_id, :tenant, :mac, :role, :owner, :label, :expires_at, :now)
    """
)
_LIVE_KEYS: Final = text(
    """
    SELECT count(*) FROM api_keys
     WHERE tenant = :tenant AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > :now)
    """
)
_KEYS: Final = text(
    """
    SELECT * FROM (
        SELECT k.*, u.disabled_at IS NOT NULL AS owner_disabled
          FROM api_keys k LEFT JOIN users u ON u.user_id = k.owner
         WHERE k.tenant = :tenant
         ORDER BY (k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > :now)) DESC, k.created_at DESC
         LIMIT :most) AS shown
     ORDER BY created_at, key_id
    """
)
_LOCK_KEY: Final = text("SELECT * FROM api_keys WHERE tenant = :tenant AND key_id = :key_id FOR UPDATE")
_EXPIRE_KEY: Final = text("UPDATE api_keys SET expires_at = :expires_at WHERE key_id = :key_id AND tenant = :tenant")
_REVOKE_KEY: Final = text("UPDATE api_keys SET revoked_at = :now WHERE key_id = :key_id AND tenant = :tenant")


class Tenants:
    """The commands and questions about tenants and their keys; whoever calls has been let into the tenant."""

    def __init__(self, ports: PeoplePorts, policy: PeoplePolicy) -> None:
        self._p = ports
        self._policy = policy

    # --- tenants --------------------------------------------------------------------------------------

    async def create(
        self, caller: Principal, scope: TenantScope, name: str, changes: Changes | None = None
    ) -> MadeTenant:
        """A tenant with its broker user, ingest queue and first API key.

        The broker's part comes first and is harmless without the row; the row, the key and the record are one commit.
        Raises AuthorizationError, ConflictError for a tenant that is there, InvalidRequestError for values that do not
        fit, MessagingFailureError while the broker's management does not answer: then nothing was made.
        """
        need(caller, Permission.TENANTS_MANAGE, None)
        broker = self._broker()
        user, password = upstream_user(scope), self._p.random(32).hex()
        thresholds, approval_policy, limits = _changed(
            Thresholds(), ApprovalPolicy(), TenantLimits(), changes or Changes()
        )
        async with transaction(self._p.engine, [scope]) as connection:
            # Of two who make one tenant at once, the second must not give its broker user another password.
            await connection.execute(_MAKING, {"space": _MAKING_LOCK, "tenant": scope.tenant_id})
            if (await connection.execute(_SHOW, {"tenant": scope.tenant_id})).first():
                raise ConflictError(f"there is a tenant {scope} already")
            async with _promptly():
                await broker.open_upstream(scope, user, password)
            values = {"tenant": scope.tenant_id, "name": name, "broker_user": user}
            await connection.execute(_INSERT, values | _stored(thresholds, approval_policy, limits))
            key = await self._insert_key(connection, caller, scope, Role.SERVICE, "first key", None)
            detail: dict[str, str | int] = {"name": name, "broker_user": user, "key": key.key_id}
            await self._p.note(connection, scope, "tenant.created", caller, {"tenant": str(scope)}, detail)
        return MadeTenant(tenant=await self.show(scope), key=key, broker_password=password)

    async def exists(self, scope: TenantScope) -> bool:
        """Whether there is such a tenant, suspended or not; looked up afresh."""
        async with transaction(self._p.engine, [scope]) as connection:
            return (await connection.execute(_SHOW, {"tenant": scope.tenant_id})).first() is not None

    async def show(self, scope: TenantScope) -> Tenant:
        """One tenant. Raises NotKnownError."""
        async with transaction(self._p.engine, [scope]) as connection:
            return _tenant(await self._found(connection, scope, _SHOW))

    async def tenants(self, caller: Principal, after: str = "", limit: int = 200) -> Sequence[Tenant]:
        """The tenants that the caller may read, in order of their ids."""
        places = caller.tenants(Permission.TENANT_READ)
        values = {"all": EVERYWHERE in places, "tenants": sorted(places), "after": after, "limit": limit}
        async with transaction(self._p.engine, ()) as connection:
            return tuple(_tenant(row) for row in (await connection.execute(_LIST, values)).all())

    async def limit(self, caller: Principal, scope: TenantScope, changes: Changes, reason: str = "") -> Tenant:
        """Change thresholds, approval policy or limits; events that are under way keep the thresholds they have.

        Raises AuthorizationError (a tenant does not choose its own limits), NotKnownError or InvalidRequestError.
        """
        need(caller, Permission.TENANTS_MANAGE, None)
        async with transaction(self._p.engine, [scope]) as connection:
            before = _tenant(await self._found(connection, scope, _LOCK))
            stored = _stored(*_changed(before.thresholds, before.approval_policy, before.limits, changes))
            await connection.execute(_UPDATE, {"tenant": scope.tenant_id} | stored)
            detail = stored | why(reason)
            await self._p.note(connection, scope, "tenant.limited", caller, {"tenant": str(scope)}, detail)
        return await self.show(scope)

    async def suspend(self, caller: Principal, scope: TenantScope, reason: str = "") -> Tenant:
        """Shut every door: keys and bound logins end within 5 s, the broker user at once.

        What was confirmed before is still decided. Raises AuthorizationError, NotKnownError, MessagingFailureError.
        """
        return await self._turn(caller, scope, "suspended", reason)

    async def resume(self, caller: Principal, scope: TenantScope, reason: str = "") -> Tenant:
        """Open the doors of a suspended tenant again. Raises as `suspend`."""
        return await self._turn(caller, scope, "active", reason)

    async def _turn(
        self, caller: Principal, scope: TenantScope, status: Literal["active", "suspended"], reason: str
    ) -> Tenant:
        """Also where the status is so already: a broker that missed it before hears it again."""
        need(caller, Permission.TENANTS_MANAGE, None)
        async with transaction(self._p.engine, [scope]) as connection:
            tenant = _tenant(await self._found(connection, scope, _LOCK))
            if tenant.broker_user is not None:
                broker = self._broker()
                async with _promptly():
                    if status == "suspended":
                        await broker.suspend_upstream(tenant.broker_user)
                    else:
                        await broker.resume_upstream(scope, tenant.broker_user)
            await connection.execute(_STATUS, {"tenant": scope.tenant_id, "status": status})
            action = "tenant.suspended" if status == "suspended" else "tenant.resumed"
            await self._p.note(connection, scope, action, caller, {"tenant": str(scope)}, why(reason))
        return await self.show(scope)

    async def rotate_broker_password(self, caller: Principal, scope: TenantScope) -> tuple[str, str]:
        """(broker user, its new password); connections that are open stay open, the old password opens none.

        Raises ConflictError while the tenant is suspended, else as `suspend`.
        """
        need(caller, Permission.TENANTS_MANAGE, None)
        password = self._p.random(32).hex()
        async with transaction(self._p.engine, [scope]) as connection:
            tenant = _tenant(await self._found(connection, scope, _LOCK))
            if tenant.status != "active":
                raise ConflictError(f"tenant {scope} is suspended; resume it first")
            user = tenant.broker_user or upstream_user(scope)
            async with _promptly():
                await self._broker().open_upstream(scope, user, password)
            action = "tenant.broker_password_set"
            await self._p.note(connection, scope, action, caller, {"tenant": str(scope)}, {"broker_user": user})
        return user, password

    # --- keys -----------------------------------------------------------------------------------------

    async def create_key(
        self,
        caller: Principal,
        scope: TenantScope,
        *,
        role: Role = Role.SERVICE,
        label: str = "",
        expires_in_s: int | None = None,
    ) -> MadeKey:
        """A new key, owned by the caller's person.

        Raises InvalidRequestError for a role that is not for keys, ConflictError beyond 100 keys that live.
        """
        if role not in (Role.SERVICE, Role.VIEWER):
            raise InvalidRequestError("a key's role is SERVICE or VIEWER")
        now = self._p.clock.now()
        expires_at = None if expires_in_s is None else now + timedelta(seconds=expires_in_s)
        async with transaction(self._p.engine, [scope]) as connection:
            await self._found(connection, scope, _LOCK)
            live = (await connection.execute(_LIVE_KEYS, {"tenant": scope.tenant_id, "now": now})).scalar_one()
            if live >= MAX_KEYS:
                raise ConflictError(f"the tenant has {MAX_KEYS} keys that live; revoke one first")
            key = await self._insert_key(connection, caller, scope, role, label, expires_at)
            detail = {"role": str(role), "label": label}
            await self._p.note(connection, scope, "key.created", caller, {"key": key.key_id}, detail)
        return key

    async def keys(self, scope: TenantScope) -> Sequence[ApiKey]:
        """The tenant's living keys and the newest dead ones, 500 at most, oldest first, without secrets."""
        values = {"tenant": scope.tenant_id, "now": self._p.clock.now(), "most": MAX_KEYS_SHOWN}
        async with transaction(self._p.engine, [scope]) as connection:
            rows = (await connection.execute(_KEYS, values)).all()
        return tuple(_api_key(row) for row in rows)

    async def rotate_key(self, caller: Principal, scope: TenantScope, key_id: str, overlap_s: int = 3_600) -> MadeKey:
        """A new key of the same role, label and lifetime; the old one ends after `overlap_s` (7 days at most).

        Raises NotKnownError, ConflictError for a key that does not live, InvalidRequestError for another overlap.
        """
        if not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise InvalidRequestError(f"the overlap lies between 0 and {MAX_OVERLAP_S:,} seconds")
        now = self._p.clock.now()
        async with transaction(self._p.engine, [scope]) as connection:
            old = await self._living(connection, scope, key_id, now)
            expires_at = None if old.expires_at is None else now + (old.expires_at - old.created_at)
            key = await self._insert_key(connection, caller, scope, Role(old.role), old.label, expires_at)
            ends = now + timedelta(seconds=overlap_s)
            ends = ends if old.expires_at is None else min(ends, old.expires_at)
            values = {"tenant": scope.tenant_id, "key_id": key_id, "expires_at": ends}
            await connection.execute(_EXPIRE_KEY, values)
            detail: dict[str, str | int] = {"by": key.key_id, "overlap_s": overlap_s}
            await self._p.note(connection, scope, "key.rotated", caller, {"key": key_id}, detail)
        return key

    async def revoke_key(self, caller: Principal, scope: TenantScope, key_id: str, reason: str = "") -> None:
        """End a key for good; it opens nothing 5 s later. A key that has ended already stays ended.

        Raises NotKnownError for a key that is not this tenant's.
        """
        async with transaction(self._p.engine, [scope]) as connection:
            row = await self._key(connection, scope, key_id)
            if row.revoked_at is None:
                values = {"tenant": scope.tenant_id, "key_id": key_id, "now": self._p.clock.now()}
                await connection.execute(_REVOKE_KEY, values)
                await self._p.note(connection, scope, "key.revoked", caller, {"key": key_id}, why(reason))

    # --- inside a transaction -------------------------------------------------------------------------

    def _broker(self) -> Broker:
        if self._p.broker is None:
            raise MessagingFailureError(
                "tenants need the broker's management API: set RISKFLEET_RABBITMQ_MANAGEMENT_URL"
            )
        return self._p.broker

    async def _found(self, connection: AsyncConnection, scope: TenantScope, query: Any) -> Any:
        row = (await connection.execute(query, {"tenant": scope.tenant_id})).first()
        if row is None:
            raise NotKnownError("no such tenant is known to you")
        return row

    async def _key(self, connection: AsyncConnection, scope: TenantScope, key_id: str) -> Any:
        """The key's row, locked. What cannot be an id is not asked for: a NUL would be an error of the driver."""
        values = {"tenant": scope.tenant_id, "key_id": key_id}
        row = (await connection.execute(_LOCK_KEY, values)).first() if _KEY_ID.fullmatch(key_id) else None
        if row is None:
            raise NotKnownError("the tenant has no such key")
        return row

    async def _living(self, connection: AsyncConnection, scope: TenantScope, key_id: str, now: datetime) -> Any:
        row = await self._key(connection, scope, key_id)
        if row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now):
            raise ConflictError("the key has ended already; make a new one")
        return row

    async def _insert_key(
        self,
        connection: AsyncConnection,
        caller: Principal,
        scope: TenantScope,
        role: Role,
        label: str,
        expires_at: datetime | None,
    ) -> MadeKey:
        api_key, key_id, mac = new_api_key(self._p.random(KEY_BYTES), self._policy.pepper)
        values = {
            "key_id": key_id,
            "tenant": scope.tenant_id,
            "mac": mac,
            "role": str(role),
            "owner": caller.person,
            "label": label,
            "expires_at": expires_at,
            "now": self._p.clock.now(),
        }
        await connection.execute(_INSERT_KEY, values)
        return MadeKey(api_key=api_key, key_id=key_id, expires_at=expires_at)


def upstream_user(scope: TenantScope) -> str:
    """The name of a tenant's broker user."""
    return f"up-{scope}"


@asynccontextmanager
async def _promptly() -> AsyncIterator[None]:
    """A time limit for the broker's management, inside a transaction that PostgreSQL would end after 5 s."""
    try:
        async with asyncio.timeout(_BROKER_S):
            yield
    except TimeoutError:
        raise MessagingFailureError("the RabbitMQ management API does not answer in time; repeat") from None


def _changed(
    thresholds: Thresholds, approval_policy: ApprovalPolicy, limits: TenantLimits, changes: Changes
) -> tuple[Thresholds, ApprovalPolicy, TenantLimits]:
    """The new values. Raises InvalidRequestError with a pointer for each field that does not fit."""
    if changes.thresholds:
        if "version" in changes.thresholds:
            raise InvalidRequestError("the version of thresholds is counted, not chosen")
        fields = thresholds.model_dump() | dict(changes.thresholds) | {"version": thresholds.version + 1}
        thresholds = _validated(Thresholds, fields, "thresholds")
        if thresholds.review_from > thresholds.reject_from:
            raise InvalidRequestError("review_from lies above reject_from: nothing could be reviewed")
        if thresholds.amount_limit is not None and not _AMOUNT.fullmatch(thresholds.amount_limit):
            raise InvalidRequestError('amount_limit is a decimal number in a string, such as "1000.00"')
    if changes.approval_policy:
        fields = approval_policy.model_dump() | dict(changes.approval_policy)
        approval_policy = _validated(ApprovalPolicy, fields, "approval_policy")
    if changes.limits:
        limits = _validated(TenantLimits, limits.model_dump() | dict(changes.limits), "limits")
    return thresholds, approval_policy, limits


def _validated(model: Any, fields: Mapping[str, Any], section: str) -> Any:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        pointers = tuple((f"/{section}{pointer}", reason) for pointer, reason in pointers_of(error))
        raise InvalidRequestError(f"{section} cannot be set so", pointers=pointers) from None


def _stored(thresholds: Thresholds, approval_policy: ApprovalPolicy, limits: TenantLimits) -> dict[str, str | int]:
    return {
        name: orjson.dumps(model.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS).decode()
        for name, model in (("thresholds", thresholds), ("approval_policy", approval_policy), ("limits", limits))
    }


def _tenant(row: Any) -> Tenant:
    """Raises InvalidTenantError for stored values that cannot be read."""
    try:
        return Tenant(
            tenant=row.tenant_id,
            name=row.name,
            status=row.status,
            broker_user=row.broker_user,
            thresholds=Thresholds.model_validate(row.thresholds),
            approval_policy=ApprovalPolicy.model_validate(row.approval_policy),
            limits=TenantLimits.model_validate(row.limits),
            created_at=row.created_at,
        )
    except ValidationError:
        raise InvalidTenantError("a tenant's stored values cannot be read; set them again in the database") from None


def _api_key(row: Any) -> ApiKey:
    return ApiKey(
        key_id=row.key_id,
        role=Role(row.role),
        label=row.label,
        owner=row.owner,
        owner_disabled=row.owner_disabled,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
