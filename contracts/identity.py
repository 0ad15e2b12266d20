"""People and programs: roles, permissions, and who is calling.

One table says what a role may do; what is not in it is denied. Pure: credentials are read and checked elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from contracts.tenancy import TenantScope

EVERYWHERE: Final = "*"
"""The tenant of a grant that holds for the whole installation; no tenant id looks like it."""


class Role(StrEnum):
    """The five roles. SERVICE is for programs: it submits, and never approves."""

    ADMIN = "ADMIN"
    ANALYST = "ANALYST"
    APPROVER = "APPROVER"
    VIEWER = "VIEWER"
    SERVICE = "SERVICE"


class Permission(StrEnum):
    """What a call may need. Calls without a permission need no credential."""

    EVENTS_SUBMIT = "events:submit"
    EVENTS_READ = "events:read"
    EVENTS_SIMULATE = "events:simulate"
    DECISIONS_READ = "decisions:read"
    LABELS_SUBMIT = "labels:submit"
    TENANT_READ = "tenant:read"
    REGISTRY_READ = "registry:read"
    REGISTRY_AUTHOR = "registry:author"
    REGISTRY_APPROVE = "registry:approve"
    REGISTRY_ACTIVATE = "registry:activate"
    APPROVALS_READ = "approvals:read"
    APPROVALS_OPEN = "approvals:open"
    APPROVALS_DECIDE = "approvals:decide"
    HALT = "halt"
    DEADLETTERS_READ = "deadletters:read"
    DEADLETTERS_PAYLOAD = "deadletters:payload"
    DEADLETTERS_RESOLVE = "deadletters:resolve"
    AUDIT_READ = "audit:read"
    TENANTS_MANAGE = "tenants:manage"
    USERS_CREATE = "users:create"
    USERS_MANAGE = "users:manage"
    KEYS_MANAGE = "keys:manage"


_READS: Final = frozenset(
    {
        Permission.EVENTS_READ,
        Permission.DECISIONS_READ,
        Permission.TENANT_READ,
        Permission.REGISTRY_READ,
        Permission.APPROVALS_READ,
        Permission.DEADLETTERS_READ,
        Permission.AUDIT_READ,
    }
)

PERMISSIONS: Final[Mapping[Role, frozenset[Permission]]] = {
    # An administrator makes tenants, users and keys, and stops things; to approve is somebody else's work.
    Role.ADMIN: _READS
    | {
        Permission.TENANTS_MANAGE,
        Permission.USERS_CREATE,
        Permission.USERS_MANAGE,
        Permission.KEYS_MANAGE,
        Permission.HALT,
        Permission.REGISTRY_ACTIVATE,
        Permission.APPROVALS_OPEN,
        Permission.DEADLETTERS_RESOLVE,
    },
    Role.ANALYST: _READS
    | {
        Permission.REGISTRY_AUTHOR,
        Permission.EVENTS_SIMULATE,
        Permission.LABELS_SUBMIT,
        Permission.APPROVALS_OPEN,
        Permission.DEADLETTERS_PAYLOAD,
    },
    Role.APPROVER: _READS
    | {
        Permission.REGISTRY_APPROVE,
        Permission.REGISTRY_ACTIVATE,
        Permission.APPROVALS_DECIDE,
        Permission.APPROVALS_OPEN,
        Permission.HALT,
        Permission.DEADLETTERS_RESOLVE,
        Permission.DEADLETTERS_PAYLOAD,
    },
    Role.VIEWER: _READS - {Permission.AUDIT_READ, Permission.DEADLETTERS_READ},
    Role.SERVICE: frozenset(
        {
            Permission.EVENTS_SUBMIT,
            Permission.EVENTS_READ,
            Permission.EVENTS_SIMULATE,
            Permission.DECISIONS_READ,
            Permission.LABELS_SUBMIT,
            Permission.TENANT_READ,
        }
    ),
}
"""The one permission table."""

EVERYWHERE_ONLY: Final = frozenset({Permission.TENANTS_MANAGE, Permission.USERS_CREATE})
"""What only a grant for the whole installation gives: a tenant's own administrator makes neither tenants nor users."""


@dataclass(frozen=True, slots=True)
class Grant:
    """One role in one tenant, or everywhere."""

    tenant: str
    role: Role


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. `actor` is `user:<id>` or `key:<public prefix>`; `person` is the user answerable for it.

    `scope` is the one tenant that the credential is bound to; None for a user who did not choose one.
    A key's person is whoever made it ("" for the demo key): what a key does is that person's doing.
    """

    actor: str
    person: str
    grants: frozenset[Grant]
    scope: TenantScope | None = None

    def may(self, permission: Permission, scope: TenantScope | None) -> bool:
        """Whether a grant in this tenant, or one for everywhere, holds the permission; None: everywhere only."""
        if self.scope is not None and scope != self.scope:
            return False
        here = scope is not None and scope.tenant_id in self._held(permission)
        return here or EVERYWHERE in self._held(permission)

    def tenants(self, permission: Permission) -> frozenset[str]:
        """The tenants in which the permission holds ("*" for all), narrowed to the credential's own tenant."""
        held = self._held(permission)
        if self.scope is None:
            return held
        own = self.scope.tenant_id
        return frozenset({own}) if held & {own, EVERYWHERE} else frozenset()

    def _held(self, permission: Permission) -> frozenset[str]:
        held = frozenset(grant.tenant for grant in self.grants if permission in PERMISSIONS[grant.role])
        return held & {EVERYWHERE} if permission in EVERYWHERE_ONLY else held


@dataclass(frozen=True, slots=True)
class Person:
    """A user as the doors need them. Tokens issued before `tokens_valid_from` are no longer good."""

    user_id: str
    grants: frozenset[Grant]
    disabled: bool = False
    tokens_valid_from: datetime | None = None
