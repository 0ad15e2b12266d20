"""Who may call what, as both OpenAPI documents declare it: every call × every caller × every place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from contracts.identity import EVERYWHERE, PERMISSIONS, Grant, Permission, Principal, Role
from contracts.tenancy import TenantScope

OWN, FOREIGN, UNKNOWN = TenantScope("acme"), TenantScope("globex"), TenantScope("nobody")
SHARED = "_shared"


@dataclass(frozen=True)
class Operation:
    """One call of a document."""

    method: str
    path: str
    name: str
    permission: Permission | None
    everywhere: bool
    open: bool
    body: str | None


@dataclass(frozen=True)
class Caller:
    """Somebody with a credential; None: nobody."""

    name: str
    principal: Principal | None


def operations(document: Mapping[str, Any]) -> list[Operation]:
    """Every call of an OpenAPI document."""
    return [
        Operation(
            method.upper(),
            path,
            call["operationId"],
            Permission(call["x-permission"]) if "x-permission" in call else None,
            call.get("x-everywhere", False),
            "security" not in call,
            next(iter(call.get("requestBody", {}).get("content", {})), None),
        )
        for path, methods in document["paths"].items()
        for method, call in methods.items()
    ]


def callers() -> list[Caller]:
    """Nobody, somebody without any grant, and each role in an own tenant and everywhere; keys are bound to theirs."""

    def user(name: str, *grants: Grant, scope: TenantScope | None = None) -> Caller:
        return Caller(name, Principal(f"user:{name.lower()}", name.lower(), frozenset(grants), scope))

    def key(role: Role) -> Caller:
        grants = frozenset({Grant(OWN.tenant_id, role)})
        return Caller(f"key {role}", Principal(f"key:{role}", "ada", grants, OWN))

    people = [role for role in Role if role is not Role.SERVICE]
    return [
        Caller("nobody", None),
        user("no grant"),
        *(user(f"{role} own", Grant(OWN.tenant_id, role)) for role in people),
        *(user(f"{role} own, bound", Grant(OWN.tenant_id, role), scope=OWN) for role in people),
        *(user(f"{role} everywhere", Grant(EVERYWHERE, role)) for role in people),
        *(key(role) for role in (Role.SERVICE, Role.VIEWER)),
    ]


def places(operation: Operation) -> list[str | None]:
    """Where a call can be tried: tenants in its path, or nowhere in particular."""
    if "{tenant}" not in operation.path:
        return [None]
    return [OWN.tenant_id, FOREIGN.tenant_id, UNKNOWN.tenant_id, SHARED]


def declared(operation: Operation, caller: Caller, place: str | None, *, shared: bool) -> str:
    """What the table of roles says: "open", "401", "403", "404" or "allowed".

    `shared`: whether the call knows what holds for the whole installation. Written from the rules in words, not from
    the code: a tenant in which the caller holds nothing is 404, a permission that is missing in an own one is 403.
    """
    if operation.open:
        return "open"
    who = caller.principal
    if who is None:
        return "401"
    held = {grant.tenant for grant in who.grants if operation.permission in PERMISSIONS[grant.role]}
    held &= {EVERYWHERE} if operation.everywhere else held
    everywhere = EVERYWHERE in held and who.scope is None
    if operation.permission is None:
        return "allowed"
    if place is None:
        return "allowed" if held else "403"
    if place == SHARED:
        return ("allowed" if everywhere else "403") if shared else "404"
    known = {grant.tenant for grant in who.grants}
    if who.scope is not None:
        known = known & {who.scope.tenant_id} | ({who.scope.tenant_id} if EVERYWHERE in known else set())
    if place not in known and (EVERYWHERE not in known or place == UNKNOWN.tenant_id):
        return "404"
    return "allowed" if place in held or EVERYWHERE in held else "403"


def cases(document: Mapping[str, Any]) -> Iterator[tuple[Operation, Caller, str | None]]:
    """Every cell of the matrix."""
    for operation in operations(document):
        for caller in callers():
            for place in places(operation):
                yield operation, caller, place
