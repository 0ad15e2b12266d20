"""What the commands of people share: their ports, their audit record, and the refusal of those who may not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.failures import AuthorizationError, NotKnownError
from contracts.identity import EVERYWHERE, Permission, Principal
from contracts.ports import Clock, Ids
from contracts.tenancy import TenantScope
from contracts.topology import RunningLayouts
from governance.audit import operator_record
from governance.passwords import Passwords
from governance.postgres.outbox import enqueue_records
from governance.tokens import TokenIssuer


class Broker(Protocol):
    """What the commands need of the broker's management. Raises MessagingFailureError."""

    async def open_upstream(self, scope: TenantScope, user: str, password: str) -> None:
        """The tenant's ingest queue and its own user, with this password; repeating it changes only the password."""
        ...

    async def suspend_upstream(self, user: str) -> None:
        """The user publishes nothing more and is disconnected; its queues stay."""
        ...

    async def resume_upstream(self, scope: TenantScope, user: str) -> None:
        """The user has its permissions again."""
        ...


@dataclass(frozen=True, slots=True)
class PeoplePolicy:
    """How people come in. `pepper` is the key of API keys' MACs; times are seconds.

    A failed login is answered after `failed_login_s` at the earliest: whether a row was written cannot be heard.
    """

    pepper: bytes = field(repr=False)
    token_ttl_s: int = 28_800
    guesses: int = 10
    lock_s: int = 900
    failed_login_s: float = 0.25


@dataclass(frozen=True, slots=True)
class PeoplePorts:
    """What the commands work with; `tokens` None: nobody can log in here, `broker` None: no tenant can be made."""

    engine: AsyncEngine
    clock: Clock
    ids: Ids
    passwords: Passwords
    layouts: RunningLayouts
    tokens: TokenIssuer | None = None
    broker: Broker | None = None

    def random(self, size: int) -> bytes:
        """So many random bytes."""
        return b"".join(bytes.fromhex(self.ids.token()) for _ in range(-(-size // 16)))[:size]

    async def note(
        self,
        connection: AsyncConnection,
        scope: TenantScope | None,
        action: str,
        caller: Principal,
        subject: Mapping[str, str | int],
        detail: Mapping[str, str | int],
    ) -> None:
        """Write a command's audit record to the outbox, in the command's transaction."""
        at = self.clock.now().isoformat(timespec="microseconds").replace("+00:00", "Z")
        record = operator_record(scope, action, caller, at, subject, detail)
        await enqueue_records(connection, scope, [record], self.layouts)


def need(caller: Principal, permission: Permission, scope: TenantScope | None) -> None:
    """Raise unless the caller may: NotKnownError for a tenant in which it holds nothing, else AuthorizationError."""
    if caller.may(permission, scope):
        return
    if scope is None:
        raise AuthorizationError(f"{permission} for the whole installation is not yours")
    if caller.scope not in (None, scope) or not {grant.tenant for grant in caller.grants} & {
        EVERYWHERE,
        scope.tenant_id,
    }:
        raise NotKnownError("no such tenant is known to you")
    raise AuthorizationError(f"the credential does not permit {permission} in this tenant")


def why(reason: str) -> dict[str, str | int]:
    """The detail of a record that has a reason."""
    return {"reason": reason} if reason else {}
