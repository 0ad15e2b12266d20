"""The operator API's desk: who stands before it, in which tenant, and what they may do there.

Promises: deny by default; a tenant in which the caller holds nothing looks exactly like one that does not exist (404,
the same body, no look-up between the two); a missing permission in one's own tenant is 403. Decides nothing else: the
gate, the approvals and the people behind the desk keep their own rules.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from starlette.requests import Request

from contracts.failures import AuthorizationError, InvalidTenantError, NotKnownError
from contracts.identity import EVERYWHERE, Permission, Principal
from contracts.ports import Clock, Credentials, Redecider, Telemetry
from contracts.tenancy import TenantScope
from gateway.web import authenticate

if TYPE_CHECKING:
    from governance.deadletters import LetterDesk
    from governance.postgres.approvals import Approvals
    from governance.postgres.gate import RegistryGate
    from governance.postgres.looking import Looking
    from governance.postgres.pauses import PostgresPauses
    from governance.postgres.people import People

SHARED: Final = "_shared"
"""The word in a path for what holds for every tenant; no tenant id begins with an underscore."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What the calls work with. `exists` looks a tenant up afresh, so that one made a moment ago is found.

    `committed` is called after a command: its outbox rows go out at once.
    """

    credentials: Credentials
    exists: Callable[[TenantScope], Awaitable[bool]]
    gate: RegistryGate
    people: People
    approvals: Approvals
    looking: Looking
    letters: LetterDesk
    redecider: Redecider
    pauses: PostgresPauses
    telemetry: Telemetry
    clock: Clock
    committed: Callable[[], None]

    async def caller(self, request: Request, permission: Permission) -> tuple[Principal, TenantScope | None]:
        """Who calls, and the tenant that the path names (None: `_shared`).

        Raises AuthenticationError, NotKnownError for a tenant in which the caller holds nothing or that does not
        exist, AuthorizationError for a permission that the caller lacks in an own tenant.
        """
        principal = await authenticate(request, self.credentials)
        name = request.path_params["tenant"]
        if name == SHARED:
            if not principal.may(permission, None):
                raise AuthorizationError(f"{permission} for the whole installation is not yours")
            return principal, None
        scope = await self._own_tenant(principal, name)
        if not principal.may(permission, scope):
            raise AuthorizationError(f"the credential does not permit {permission} in this tenant")
        return principal, scope

    async def tenant(self, request: Request, permission: Permission) -> tuple[Principal, TenantScope]:
        """As `caller`, for calls that mean one tenant: `_shared` is then not known."""
        if request.path_params["tenant"] == SHARED:
            await authenticate(request, self.credentials)
            raise NotKnownError(_NO_TENANT)
        principal, scope = await self.caller(request, permission)
        if scope is None:
            raise NotKnownError(_NO_TENANT)
        return principal, scope

    async def anybody(self, request: Request, permission: Permission | None = None) -> Principal:
        """Who calls, for calls without a tenant; `permission` must be held in some tenant, or everywhere.

        Raises AuthenticationError or AuthorizationError.
        """
        principal = await authenticate(request, self.credentials)
        if permission is not None and not principal.tenants(permission):
            raise AuthorizationError(f"the credential does not permit {permission}")
        return principal

    async def _own_tenant(self, principal: Principal, name: str) -> TenantScope:
        """Grants first: nothing is looked up for a tenant that is not the caller's."""
        places = {grant.tenant for grant in principal.grants}
        bound = principal.scope is not None and principal.scope.tenant_id != name
        if bound or not places & {name, EVERYWHERE}:
            raise NotKnownError(_NO_TENANT)
        try:
            scope = TenantScope(name)
        except InvalidTenantError:
            raise NotKnownError(_NO_TENANT) from None
        if name not in places and not await self.exists(scope):
            raise NotKnownError(_NO_TENANT)
        return scope


_NO_TENANT: Final = "no such tenant is known to you"
