"""Users, their grants and their logins: every command in one transaction with its audit record in the outbox.

Promises: a user has at most ten guesses in a quarter of an hour, however many arrive at once; an unknown user, a wrong
password, a locked and a disabled user get one answer after one time; nobody changes their own grants or disables
themselves; one administrator of the whole installation always remains. A tenant's administrator gives and takes roles
in that tenant only: users belong to the installation. What a role may do stands in `contracts.identity`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from pydantic import BaseModel, ConfigDict
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from contracts.failures import (
    AuthenticationError,
    AuthorizationError,
    ConflictError,
    EncryptionError,
    InvalidRequestError,
    NotKnownError,
)
from contracts.identity import EVERYWHERE, Grant, Permission, Principal, Role
from contracts.tenancy import TenantScope
from governance.passwords import SALT_BYTES
from governance.postgres.commands import PeoplePolicy, PeoplePorts, need, why
from governance.postgres.engine import sqlstate, transaction
from governance.postgres.tenants import Tenants

USER_ID: Final = re.compile(r"[a-z0-9][a-z0-9._@-]{0,126}")
"""A user's id: lower case only, so that nobody is two people by spelling."""

_UNIQUE_VIOLATION: Final = "23505"
_LAST_ADMIN_LOCK: Final = 7_205_759_403_794
_NOBODY: Final = Principal("nobody", "", frozenset())


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """A login: the token to show once, until when it is good, and the tenant that it is bound to."""

    token: str = field(repr=False)
    expires_at: datetime
    tenant: TenantScope | None


class User(BaseModel):
    """A user as administrators see one; `grants` are those that the asking administrator may see."""

    model_config = ConfigDict(frozen=True)
    user: str
    name: str
    grants: tuple[Grant, ...]
    created_at: datetime
    disabled_at: datetime | None
    locked_until: datetime | None
    by_password: bool
    oidc_issuer: str | None
    oidc_subject: str | None


# The guess is counted before the password is compared: so many at once as there may be, and no more, get through.
_GUESS: Final = text(
    """
    UPDATE users
       SET failed_logins = CASE WHEN locked_until IS NULL THEN failed_logins ELSE 0 END + 1,
           locked_until = CASE
               WHEN (CASE WHEN locked_until IS NULL THEN failed_logins ELSE 0 END) + 1 >= CAST(:guesses AS integer)
               THEN CAST(:until AS timestamptz) END
     WHERE user_id = :user_id AND disabled_at IS NULL AND password_hash IS NOT NULL
       AND (locked_until IS NULL OR locked_until <= :now)
    RETURNING password_hash, locked_until
    """
)
_RIGHT: Final = text(
    """
    UPDATE users SET failed_logins = 0, locked_until = NULL, password_hash = CAST(:fresh AS text)
     WHERE user_id = :user_id AND disabled_at IS NULL AND password_hash = :stored
    RETURNING user_id
    """
)
_PLACES: Final = text(
    """
    SELECT EXISTS (SELECT 1 FROM memberships WHERE user_id = :user_id AND tenant IN (:tenant, '*'))
       AND EXISTS (SELECT 1 FROM tenants WHERE tenant_id = :tenant AND status = 'active')
    """
)
_INSERT_USER: Final = text(
    """
    INSERT INTO users (user_id, name, password_hash, oidc_issuer, oidc_subject)
    VALUES (:user_id, :name, :password_hash, :issuer, :subject)
    """
)
_LOCK_USER: Final = text("SELECT user_id, password_hash, disabled_at FROM users WHERE user_id = :user_id FOR UPDATE")
_OTHER_ADMINS: Final = text(
    """
    SELECT count(*) FROM memberships m JOIN users u USING (user_id)
     WHERE m.tenant = '*' AND m.role = 'ADMIN' AND u.disabled_at IS NULL AND m.user_id <> :user_id
    """
)
_IS_ADMIN: Final = text(
    "SELECT EXISTS (SELECT 1 FROM memberships WHERE user_id = :user_id AND tenant = '*' AND role = 'ADMIN')"
)
_DISABLE: Final = text("UPDATE users SET disabled_at = :now, tokens_valid_from = :now WHERE user_id = :user_id")
_ENABLE: Final = text(
    "UPDATE users SET disabled_at = NULL, failed_logins = 0, locked_until = NULL WHERE user_id = :user_id"
)
_SET_PASSWORD: Final = text(
    """
    UPDATE users SET password_hash = :password_hash, tokens_valid_from = :now, failed_logins = 0, locked_until = NULL
     WHERE user_id = :user_id
    """
)
_OUT: Final = text("UPDATE users SET tokens_valid_from = :now WHERE user_id = :user_id RETURNING user_id")
_GRANT: Final = text(
    """
    INSERT INTO memberships (user_id, tenant, role, granted_by) VALUES (:user_id, :tenant, :role, :by)
    ON CONFLICT DO NOTHING RETURNING user_id
    """
)
_REVOKE: Final = text(
    "DELETE FROM memberships WHERE user_id = :user_id AND tenant = :tenant AND role = :role RETURNING user_id"
)
_KNOWN_TENANT: Final = text("SELECT 1 FROM tenants WHERE tenant_id = :tenant")
_USERS: Final = """
    SELECT u.*, g.grants
      FROM users u,
           LATERAL (SELECT array(SELECT ARRAY[m.tenant, m.role] FROM memberships m
                                  WHERE m.user_id = u.user_id AND (:all OR m.tenant = ANY(CAST(:tenants AS text[])))
                                  ORDER BY m.tenant, m.role) AS grants) g
     WHERE (:all OR cardinality(g.grants) > 0) AND
"""
_LIST: Final = text(_USERS + "u.user_id > :after ORDER BY u.user_id LIMIT :limit")
_ONE: Final = text(_USERS + "u.user_id = :user_id")


class People:
    """The commands and questions about users; `tenants` has those about tenants and API keys."""

    def __init__(self, ports: PeoplePorts, policy: PeoplePolicy) -> None:
        self._p = ports
        self._policy = policy
        self.tenants = Tenants(ports, policy)

    # --- logins ---------------------------------------------------------------------------------------

    async def login(self, user_id: str, password: str, scope: TenantScope | None = None) -> LoggedIn:
        """A token for a user who knows the password, bound to a tenant when one is named.

        Raises AuthenticationError (one answer for every reason), NotKnownError for a tenant in which the user holds
        nothing, LimitExceededError for too many logins at once, EncryptionError without a signing key.
        """
        tokens = self._p.tokens
        if tokens is None or not tokens.can_issue:
            raise EncryptionError("this process has no key to sign logins with; run 'riskfleet keys init'")
        began = self._p.clock.monotonic()
        if not await self._guess(user_id, password):
            rest = self._policy.failed_login_s - (self._p.clock.monotonic() - began)
            await asyncio.sleep(max(rest, 0.0))
            raise AuthenticationError("the user or the password is wrong, or the user is locked or disabled")
        now = self._p.clock.now()
        caller = Principal(f"user:{user_id}", user_id, frozenset())
        async with transaction(self._p.engine, [None]) as connection:
            if scope is not None:
                values = {"user_id": user_id, "tenant": scope.tenant_id}
                if not (await connection.execute(_PLACES, values)).scalar_one():
                    raise NotKnownError("no such tenant is known to you")
            where = {} if scope is None else {"tenant": scope.tenant_id}
            await self._p.note(connection, None, "user.logged_in", caller, {"user": user_id}, where)
        token = tokens.issue(user_id, scope, now, self._policy.token_ttl_s, self._p.ids.token())
        return LoggedIn(token, now + timedelta(seconds=self._policy.token_ttl_s), scope)

    async def _guess(self, user_id: str, password: str) -> bool:
        """Count a guess, compare, and take the count back when it was right.

        The last guess locks before it is compared, and a right one opens again: both stand in the audit.
        """
        self._p.passwords.check_room()
        stored, locked = await self._count_guess(user_id)
        if not await self._p.passwords.matches(password, stored) or stored is None:
            return False
        fresh = stored
        if self._p.passwords.outdated(stored):
            fresh = await self._p.passwords.renew(password, self._p.random(SALT_BYTES))
        async with transaction(self._p.engine, [None]) as connection:
            values = {"user_id": user_id, "stored": stored, "fresh": fresh}
            right = (await connection.execute(_RIGHT, values)).one_or_none() is not None
            if right and locked:
                await self._p.note(connection, None, "user.unlocked", _NOBODY, {"user": user_id}, {})
        return right

    async def _count_guess(self, user_id: str) -> tuple[str | None, bool]:
        """The hash to compare with, and whether this was the last guess before the lock."""
        if not USER_ID.fullmatch(user_id):
            return None, False
        now = self._p.clock.now()
        until = now + timedelta(seconds=self._policy.lock_s)
        values = {"user_id": user_id, "now": now, "until": until, "guesses": self._policy.guesses}
        async with transaction(self._p.engine, [None]) as connection:
            row = (await connection.execute(_GUESS, values)).one_or_none()
            locked = row is not None and row.locked_until is not None
            if locked:
                # With the lock itself: a process that dies now leaves no lock without its record.
                await self._p.note(connection, None, "user.locked", _NOBODY, {"user": user_id}, {})
        return (None if row is None else row.password_hash), locked

    async def logout_everywhere(self, caller: Principal) -> None:
        """End every token of the caller that was issued until now. Raises AuthorizationError for an API key."""
        user_id = _user_of(caller)
        async with transaction(self._p.engine, [None]) as connection:
            await connection.execute(_OUT, {"user_id": user_id, "now": self._p.clock.now()})
            await self._p.note(connection, None, "user.logged_out_everywhere", caller, {"user": user_id}, {})

    # --- users ----------------------------------------------------------------------------------------

    async def create(
        self,
        caller: Principal,
        user_id: str,
        name: str,
        *,
        password: str | None = None,
        oidc: tuple[str, str] | None = None,
    ) -> User:
        """Make a user without any grant; `oidc` is (issuer, subject).

        Raises AuthorizationError unless the caller administers the installation, InvalidRequestError for an id or
        password that cannot be one, ConflictError when the id or the subject is taken.
        """
        _need_everywhere(caller)
        if not USER_ID.fullmatch(user_id):
            raise InvalidRequestError(
                "a user id has 1 to 127 of a-z, 0-9, '.', '_', '@' and '-', and begins with a letter or digit"
            )
        hashed = None if password is None else await self._p.passwords.hash(password, self._p.random(SALT_BYTES))
        issuer, subject = oidc or (None, None)
        values = {
            "user_id": user_id,
            "name": name,
            "password_hash": hashed,
            "issuer": issuer,
            "subject": subject,
        }
        try:
            async with transaction(self._p.engine, [None]) as connection:
                await connection.execute(_INSERT_USER, values)
                how = {"password": int(hashed is not None), "oidc": int(oidc is not None)}
                await self._p.note(connection, None, "user.created", caller, {"user": user_id}, how)
        except IntegrityError as error:
            if sqlstate(error) != _UNIQUE_VIOLATION:
                raise
            raise ConflictError("there is such a user already, or one with that subject") from None
        return await self._one(user_id)

    async def disable(self, caller: Principal, user_id: str, reason: str = "") -> User:
        """Let a user in no more; every token of theirs ends within 5 s. Their API keys, the tenant's, go on.

        Raises AuthorizationError, NotKnownError, and ConflictError for the last administrator.
        """
        _need_everywhere(caller)
        if caller.person == user_id:
            raise AuthorizationError("nobody disables themselves; another administrator can")
        async with transaction(self._p.engine, [None]) as connection:
            await self._lock_admins(connection)
            await self._lock_user(connection, user_id)
            if (await connection.execute(_IS_ADMIN, {"user_id": user_id})).scalar_one():
                await self._leave_an_admin(connection, user_id)
            await connection.execute(_DISABLE, {"user_id": user_id, "now": self._p.clock.now()})
            await self._p.note(connection, None, "user.disabled", caller, {"user": user_id}, why(reason))
        return await self._one(user_id)

    async def enable(self, caller: Principal, user_id: str, reason: str = "") -> User:
        """Let a disabled or locked user in again. Raises AuthorizationError or NotKnownError."""
        _need_everywhere(caller)
        if caller.person == user_id:
            raise AuthorizationError("nobody enables themselves; another administrator can")
        async with transaction(self._p.engine, [None]) as connection:
            await self._lock_user(connection, user_id)
            await connection.execute(_ENABLE, {"user_id": user_id})
            await self._p.note(connection, None, "user.enabled", caller, {"user": user_id}, why(reason))
        return await self._one(user_id)

    async def set_password(self, caller: Principal, user_id: str, password: str, current: str | None = None) -> None:
        """Change a password: one's own with the current one, or another's as administrator of the installation.

        Ends every token of the user. Raises AuthorizationError, NotKnownError or InvalidRequestError.
        """
        own = _user_of(caller) == user_id
        if not own:
            _need_everywhere(caller)
        hashed = await self._p.passwords.hash(password, self._p.random(SALT_BYTES))
        if own and not await self._guess(user_id, current or ""):
            raise AuthorizationError("the current password is not right, or the user is locked")
        async with transaction(self._p.engine, [None]) as connection:
            await self._lock_user(connection, user_id)
            values = {"user_id": user_id, "password_hash": hashed, "now": self._p.clock.now()}
            await connection.execute(_SET_PASSWORD, values)
            await self._p.note(connection, None, "user.password_set", caller, {"user": user_id}, {"own": int(own)})

    async def users(self, caller: Principal, after: str = "", limit: int = 200) -> Sequence[User]:
        """The users whom the caller administers, in order of their ids: all, or those with a role in own tenants."""
        places = caller.tenants(Permission.USERS_MANAGE)
        everybody = EVERYWHERE in places
        values = {"all": everybody, "tenants": sorted(places), "after": after, "limit": limit}
        async with transaction(self._p.engine, ()) as connection:
            rows = (await connection.execute(_LIST, values)).all()
        return tuple(_user(row) for row in rows)

    # --- grants ---------------------------------------------------------------------------------------

    async def grant(
        self, caller: Principal, user_id: str, scope: TenantScope | None, role: Role, reason: str = ""
    ) -> bool:
        """Give a role in a tenant (None: everywhere); False when the user has it already.

        Raises AuthorizationError, NotKnownError, and InvalidRequestError for a role that is not for people.
        """
        self._check_grant(caller, user_id, scope, role)
        async with transaction(self._p.engine, [scope]) as connection:
            if scope is not None and not (await connection.execute(_KNOWN_TENANT, {"tenant": _place(scope)})).first():
                raise NotKnownError("no such tenant is known to you")
            await self._lock_user(connection, user_id)
            values = {"user_id": user_id, "tenant": _place(scope), "role": str(role), "by": caller.person}
            made = (await connection.execute(_GRANT, values)).one_or_none() is not None
            if made:
                detail = {"role": str(role), "place": _place(scope)} | why(reason)
                await self._p.note(connection, scope, "user.granted", caller, {"user": user_id}, detail)
        return made

    async def revoke(
        self, caller: Principal, user_id: str, scope: TenantScope | None, role: Role, reason: str = ""
    ) -> None:
        """Take a role away. Raises AuthorizationError, NotKnownError, and ConflictError for the last administrator."""
        self._check_grant(caller, user_id, scope, role)
        async with transaction(self._p.engine, [scope]) as connection:
            await self._lock_admins(connection)
            values = {"user_id": user_id, "tenant": _place(scope), "role": str(role)}
            if (await connection.execute(_REVOKE, values)).one_or_none() is None:
                raise NotKnownError("the user has no such role there")
            if scope is None and role is Role.ADMIN:
                await self._leave_an_admin(connection, user_id)
            detail = {"role": str(role), "place": _place(scope)} | why(reason)
            await self._p.note(connection, scope, "user.revoked", caller, {"user": user_id}, detail)

    def _check_grant(self, caller: Principal, user_id: str, scope: TenantScope | None, role: Role) -> None:
        need(caller, Permission.USERS_MANAGE, scope)
        if not USER_ID.fullmatch(user_id):
            raise NotKnownError("there is no such user")
        if role is Role.SERVICE:
            raise InvalidRequestError("the role SERVICE is for API keys, not for people")
        if caller.person == user_id:
            raise AuthorizationError("nobody changes their own grants; another administrator can")

    # --- inside a transaction -------------------------------------------------------------------------

    async def _lock_admins(self, connection: AsyncConnection) -> None:
        """Two administrators who remove each other at once must not both succeed."""
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LAST_ADMIN_LOCK})

    async def _leave_an_admin(self, connection: AsyncConnection, user_id: str) -> None:
        if not (await connection.execute(_OTHER_ADMINS, {"user_id": user_id})).scalar_one():
            raise ConflictError("this is the last administrator of the installation; make another one first")

    async def _lock_user(self, connection: AsyncConnection, user_id: str) -> None:
        # What cannot be an id is not asked for: a NUL would be an error of the driver.
        if not USER_ID.fullmatch(user_id) or not (await connection.execute(_LOCK_USER, {"user_id": user_id})).first():
            raise NotKnownError("there is no such user")

    async def _one(self, user_id: str) -> User:
        async with transaction(self._p.engine, ()) as connection:
            values = {"all": True, "tenants": [], "user_id": user_id}
            return _user((await connection.execute(_ONE, values)).one())


def _need_everywhere(caller: Principal) -> None:
    need(caller, Permission.USERS_MANAGE, None)


def _user_of(caller: Principal) -> str:
    if not caller.actor.startswith("user:"):
        raise AuthorizationError("this is for users; an API key has no password and no login")
    return caller.person


def _place(scope: TenantScope | None) -> str:
    return EVERYWHERE if scope is None else scope.tenant_id


def _user(row: Any) -> User:
    return User(
        user=row.user_id,
        name=row.name,
        grants=tuple(Grant(tenant, Role(role)) for tenant, role in row.grants),
        created_at=row.created_at,
        disabled_at=row.disabled_at,
        locked_until=row.locked_until,
        by_password=row.password_hash is not None,
        oidc_issuer=row.oidc_issuer,
        oidc_subject=row.oidc_subject,
    )
