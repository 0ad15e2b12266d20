"""The operator API's calls about logins, users, tenants and API keys.

Promises: who calls is checked before the body is read; a secret is answered once, and never to be stored on the way;
a tenant in which the caller holds nothing looks like one that does not exist. Rules about people live behind the desk.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from contracts.failures import LimitExceededError
from contracts.identity import EVERYWHERE, Grant, Permission, Role
from contracts.messages import JSON
from contracts.telemetry import LOGINS, Measurement
from contracts.tenancy import TenantScope
from gateway.calls import Answer, Call, Endpoint, Parameter
from gateway.control.desk import Desk
from gateway.control.parameters import AFTER, TENANT, command, one
from gateway.web import json_answer
from governance.postgres.people import User
from governance.postgres.tenants import ApiKey, Changes, MadeKey, MadeTenant, Tenant

_SECRET: Final = {"Cache-Control": "no-store"}
_PAGE: Final = 200

M = TypeVar("M", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Login(_Body):
    """Who logs in. With a tenant the token is bound to it, as the ingest gateway needs it."""

    user: str = Field(max_length=256)
    password: str = Field(max_length=4_096)
    tenant: str | None = Field(default=None, max_length=63)


class Token(BaseModel):
    """A login: present the token as `Authorization: Bearer`."""

    token: str
    expires_at: datetime
    tenant: str | None


class Me(BaseModel):
    """Who the credential belongs to, and what it holds."""

    actor: str
    person: str
    tenant: str | None
    grants: tuple[Grant, ...]


class Reasoned(_Body):
    """A command's reason, for the audit."""

    reason: str = Field(default="", max_length=500)


class OidcSubject(_Body):
    """A user as an OpenID Connect issuer knows one."""

    issuer: str = Field(min_length=1, max_length=500)
    subject: str = Field(min_length=1, max_length=255)


class NewUser(_Body):
    """A user without any grant. Without a password or OpenID Connect subject nobody can log in as them yet."""

    user: str = Field(max_length=127)
    name: str = Field(min_length=1, max_length=200)
    password: str | None = Field(default=None, max_length=4_096)
    oidc: OidcSubject | None = None


class NewPassword(_Body):
    """A new password; `current` is needed for one's own."""

    password: str = Field(max_length=4_096)
    current: str | None = Field(default=None, max_length=4_096)


class GrantChange(Reasoned):
    """One role in one tenant, or everywhere ("*")."""

    tenant: str = Field(max_length=63)
    role: Role = Field(strict=False)


class TenantChanges(Reasoned):
    """What is to change; a section, and a field of a section, that is not named stays as it is."""

    thresholds: dict[str, Any] | None = None
    approval_policy: dict[str, Any] | None = None
    limits: dict[str, Any] | None = None


class NewTenant(TenantChanges):
    """A tenant to make, with its broker user, ingest queue and first API key."""

    tenant: str = Field(max_length=63)
    name: str = Field(min_length=1, max_length=200)


class NewKey(_Body):
    """A key to make; it never expires unless `expires_in_s` says so."""

    role: Role = Field(default=Role.SERVICE, strict=False)
    label: str = Field(default="", max_length=100)
    expires_in_s: int | None = Field(default=None, ge=60, le=10 * 365 * 86_400)


class Rotation(_Body):
    """How long the old key goes on beside the new one, in seconds."""

    overlap_s: int = Field(default=3_600, ge=0, le=7 * 86_400)


class BrokerLogin(BaseModel):
    """A tenant's broker user with its new password."""

    broker_user: str
    broker_password: str


class Users(BaseModel):
    """A page of users; `next` goes on behind it, None at the end."""

    users: tuple[User, ...]
    next: str | None


class TenantList(BaseModel):
    """A page of tenants; `next` goes on behind it, None at the end."""

    tenants: tuple[Tenant, ...]
    next: str | None


class Keys(BaseModel):
    """A tenant's API keys, oldest first."""

    keys: tuple[ApiKey, ...]


def calls(desk: Desk) -> list[Call]:
    """Every call about people and tenants."""
    return [
        *_login_calls(_Logins(desk)),
        *_user_calls(_Users(desk)),
        *_tenant_calls(_Tenants(desk)),
        *_key_calls(_Keys(desk)),
    ]


# --- logins -------------------------------------------------------------------------------------------


class _Logins:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def login(self, request: Request) -> Response:
        body = await _read(request, Login)
        scope = None if body.tenant is None else TenantScope(body.tenant)
        result = "refused"
        try:
            made = await self._desk.people.login(body.user, body.password, scope)
            result = "success"
        except LimitExceededError:
            result = "limited"
            raise
        finally:
            self._desk.telemetry.record(Measurement(LOGINS, labels={"result": result}))
        self._desk.committed()
        return _answer(200, Token(token=made.token, expires_at=made.expires_at, tenant=body.tenant), _SECRET)

    async def logout_everywhere(self, request: Request) -> Response:
        caller = await self._desk.anybody(request)
        await self._desk.people.logout_everywhere(caller)
        self._desk.committed()
        return Response(status_code=204)

    async def me(self, request: Request) -> Response:
        caller = await self._desk.anybody(request)
        grants = tuple(sorted(caller.grants, key=lambda grant: (grant.tenant, grant.role)))
        tenant = None if caller.scope is None else str(caller.scope)
        return _answer(200, Me(actor=caller.actor, person=caller.person, tenant=tenant, grants=grants))


def _login_calls(logins: _Logins) -> list[Call]:
    token, ended = Answer("A token", Token), Answer("Every token issued until now ends, within 5 s everywhere")
    return [
        _call("POST /ops/v1/login", "login", "Log in with a password", logins.login, None, {200: token}, Login),
        _call(
            "POST /ops/v1/logout-everywhere",
            "logoutEverywhere",
            "End every token of one's own; needs a login, and no permission",
            logins.logout_everywhere,
            None,
            {204: ended},
        ),
        _call(
            "GET /ops/v1/me",
            "getMe",
            "Who the credential belongs to; needs a credential, and no permission",
            logins.me,
            None,
            {200: Answer("The caller", Me)},
        ),
    ]


# --- users --------------------------------------------------------------------------------------------


class _Users:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def page(self, request: Request) -> Response:
        caller = await self._desk.anybody(request, Permission.USERS_MANAGE)
        found = await self._desk.people.users(caller, one(request, "after") or "", _PAGE)
        return _answer(200, Users(users=tuple(found), next=found[-1].user if len(found) == _PAGE else None))

    async def create(self, request: Request) -> Response:
        caller = await self._desk.anybody(request, Permission.USERS_CREATE)
        body = await _read(request, NewUser)
        oidc = None if body.oidc is None else (body.oidc.issuer, body.oidc.subject)
        made = await self._desk.people.create(caller, body.user, body.name, password=body.password, oidc=oidc)
        self._desk.committed()
        return _answer(201, made)

    async def disable(self, request: Request) -> Response:
        caller = await self._desk.anybody(request, Permission.USERS_CREATE)
        body = await _read(request, Reasoned, empty=True)
        user = await self._desk.people.disable(caller, request.path_params["user"], body.reason)
        self._desk.committed()
        return _answer(200, user)

    async def enable(self, request: Request) -> Response:
        caller = await self._desk.anybody(request, Permission.USERS_CREATE)
        body = await _read(request, Reasoned, empty=True)
        user = await self._desk.people.enable(caller, request.path_params["user"], body.reason)
        self._desk.committed()
        return _answer(200, user)

    async def password(self, request: Request) -> Response:
        caller = await self._desk.anybody(request)
        body = await _read(request, NewPassword)
        await self._desk.people.set_password(caller, request.path_params["user"], body.password, body.current)
        self._desk.committed()
        return Response(status_code=204)

    async def grant(self, request: Request) -> Response:
        caller = await self._desk.anybody(request, Permission.USERS_MANAGE)
        body = await _read(request, GrantChange)
        user = request.path_params["user"]
        made = await self._desk.people.grant(caller, user, _place(body.tenant), body.role, body.reason)
        self._desk.committed()
        return Response(status_code=201 if made else 204)

    async def revoke(self, request: Request) -> Response:
        caller = await self._desk.anybody(request, Permission.USERS_MANAGE)
        body = await _read(request, GrantChange)
        user = request.path_params["user"]
        await self._desk.people.revoke(caller, user, _place(body.tenant), body.role, body.reason)
        self._desk.committed()
        return Response(status_code=204)


def _user_calls(users: _Users) -> list[Call]:
    manage, make, user = Permission.USERS_MANAGE, Permission.USERS_CREATE, Answer("The user", User)
    path = "/ops/v1/users/{user}"
    page = Answer("A page of users", Users)
    given = {201: Answer("The user has the role now"), 204: Answer("The user had it already")}
    taken = {204: Answer("The user has the role no more, within 5 s everywhere")}
    changed = {204: Answer("The password is changed, and every token of the user ended")}
    return [
        _call("GET /ops/v1/users", "listUsers", "The users whom one administers", users.page, manage, {200: page}),
        _call(
            "POST /ops/v1/users",
            "createUser",
            "Make a user; for administrators of the installation",
            users.create,
            make,
            {201: user},
            NewUser,
        ),
        _call(
            f"POST {path}/disable", "disableUser", "Let a user in no more", users.disable, make, {200: user}, Reasoned
        ),
        _call(
            f"POST {path}/enable",
            "enableUser",
            "Let a disabled or locked user in again",
            users.enable,
            make,
            {200: user},
            Reasoned,
        ),
        _call(
            f"POST {path}/password",
            "setPassword",
            "Change one's own password, or another's as administrator of the installation",
            users.password,
            None,
            changed,
            NewPassword,
        ),
        _call(f"PUT {path}/grants", "grantRole", "Give a role", users.grant, manage, given, GrantChange),
        _call(f"DELETE {path}/grants", "revokeRole", "Take a role away", users.revoke, manage, taken, GrantChange),
    ]


# --- tenants ------------------------------------------------------------------------------------------


class _Tenants:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def page(self, request: Request) -> Response:
        caller = await self._desk.anybody(request, Permission.TENANT_READ)
        found = await self._desk.people.tenants.tenants(caller, one(request, "after") or "", _PAGE)
        return _answer(200, TenantList(tenants=tuple(found), next=found[-1].tenant if len(found) == _PAGE else None))

    async def create(self, request: Request) -> Response:
        caller = await self._desk.anybody(request, Permission.TENANTS_MANAGE)
        body = await _read(request, NewTenant)
        made = await self._desk.people.tenants.create(caller, TenantScope(body.tenant), body.name, _changes(body))
        self._desk.committed()
        return _answer(201, made, _SECRET)

    async def show(self, request: Request) -> Response:
        _, scope = await self._desk.tenant(request, Permission.TENANT_READ)
        return _answer(200, await self._desk.people.tenants.show(scope))

    async def limit(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.TENANTS_MANAGE)
        body = await _read(request, TenantChanges)
        tenant = await self._desk.people.tenants.limit(caller, scope, _changes(body), body.reason)
        self._desk.committed()
        return _answer(200, tenant)

    async def suspend(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.TENANTS_MANAGE)
        body = await _read(request, Reasoned, empty=True)
        tenant = await self._desk.people.tenants.suspend(caller, scope, body.reason)
        self._desk.committed()
        return _answer(200, tenant)

    async def resume(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.TENANTS_MANAGE)
        body = await _read(request, Reasoned, empty=True)
        tenant = await self._desk.people.tenants.resume(caller, scope, body.reason)
        self._desk.committed()
        return _answer(200, tenant)

    async def broker_password(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.TENANTS_MANAGE)
        user, password = await self._desk.people.tenants.rotate_broker_password(caller, scope)
        self._desk.committed()
        return _answer(200, BrokerLogin(broker_user=user, broker_password=password), _SECRET)


def _tenant_calls(tenants: _Tenants) -> list[Call]:
    read, manage, path = Permission.TENANT_READ, Permission.TENANTS_MANAGE, "/ops/v1/tenants/{tenant}"
    page, seen = {200: Answer("A page of tenants", TenantList)}, {200: Answer("The tenant", Tenant)}
    return [
        _call("GET /ops/v1/tenants", "listTenants", "The tenants that one may read", tenants.page, read, page),
        _call(
            "POST /ops/v1/tenants",
            "createTenant",
            "Make a tenant with its broker user, ingest queue and first key; for administrators of the installation",
            tenants.create,
            manage,
            {201: Answer("The tenant with its secrets, shown this once", MadeTenant)},
            NewTenant,
        ),
        _call(f"GET {path}", "showTenant", "One tenant", tenants.show, read, seen),
        _call(
            f"PUT {path}/limits",
            "limitTenant",
            "Change thresholds, approval policy or limits; for administrators of the installation",
            tenants.limit,
            manage,
            seen,
            TenantChanges,
        ),
        _call(
            f"POST {path}/suspend", "suspendTenant", "Shut a tenant's doors", tenants.suspend, manage, seen, Reasoned
        ),
        _call(f"POST {path}/resume", "resumeTenant", "Open them again", tenants.resume, manage, seen, Reasoned),
        _call(
            f"POST {path}/broker-password",
            "setBrokerPassword",
            "Give the tenant's broker user another password; for administrators of the installation",
            tenants.broker_password,
            manage,
            {200: Answer("The user and its password, shown this once", BrokerLogin)},
        ),
    ]


# --- keys ---------------------------------------------------------------------------------------------


class _Keys:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def listed(self, request: Request) -> Response:
        _, scope = await self._desk.tenant(request, Permission.KEYS_MANAGE)
        return _answer(200, Keys(keys=tuple(await self._desk.people.tenants.keys(scope))))

    async def create(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.KEYS_MANAGE)
        body = await _read(request, NewKey, empty=True)
        made = await self._desk.people.tenants.create_key(
            caller, scope, role=body.role, label=body.label, expires_in_s=body.expires_in_s
        )
        self._desk.committed()
        return _answer(201, made, _SECRET)

    async def rotate(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.KEYS_MANAGE)
        body = await _read(request, Rotation, empty=True)
        key_id = request.path_params["key"]
        made = await self._desk.people.tenants.rotate_key(caller, scope, key_id, body.overlap_s)
        self._desk.committed()
        return _answer(201, made, _SECRET)

    async def revoke(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.KEYS_MANAGE)
        body = await _read(request, Reasoned, empty=True)
        await self._desk.people.tenants.revoke_key(caller, scope, request.path_params["key"], body.reason)
        self._desk.committed()
        return Response(status_code=204)


def _key_calls(keys: _Keys) -> list[Call]:
    manage, path = Permission.KEYS_MANAGE, "/ops/v1/tenants/{tenant}/keys"
    made = {201: Answer("The key, shown this once", MadeKey)}
    ended = {204: Answer("The key opens nothing any more, within 5 s everywhere")}
    return [
        _call(
            f"GET {path}",
            "listKeys",
            "A tenant's API keys, without secrets; one whose owner is disabled goes on, and says so",
            keys.listed,
            manage,
            {200: Answer("The keys", Keys)},
        ),
        _call(f"POST {path}", "createKey", "Make an API key", keys.create, manage, made, NewKey),
        _call(
            f"POST {path}/{{key}}/rotate",
            "rotateKey",
            "Make a key that takes another's place; the old one ends after the overlap",
            keys.rotate,
            manage,
            made,
            Rotation,
        ),
        _call(f"DELETE {path}/{{key}}", "revokeKey", "End a key for good", keys.revoke, manage, ended, Reasoned),
    ]


# --- what they share ----------------------------------------------------------------------------------


_PARAMETERS: Final = {
    "user": Parameter("user", "path", "The user's id."),
    "tenant": TENANT,
    "key": Parameter("key", "path", "The key's public id, rfk_…", {"type": "string", "pattern": "^rfk_[0-9a-f]{12}$"}),
}


def _call(
    where: str,
    operation: str,
    summary: str,
    endpoint: Endpoint,
    permission: Permission | None,
    answers: Mapping[int, Answer],
    body: type[BaseModel] | None = None,
) -> Call:
    """A call of this module: its parameters are those of its path, its problems those of its kind."""
    method, _, path = where.partition(" ")
    named = tuple(parameter for name, parameter in _PARAMETERS.items() if f"{{{name}}}" in path)
    lists = method == "GET" and path.rpartition("/")[2] in ("users", "tenants")
    known = permission is None and operation != "login"
    problems = {503} | ({401} if permission is None else set()) | ({403} if known and method != "GET" else set())
    problems |= {400, 413, 415, 422} if body else set()
    problems |= {404, 409} if method != "GET" else {404} if named else set()
    problems |= {429} if body in (Login, NewPassword, NewUser) else set()  # what costs a hash
    return Call(
        method=method,  # type: ignore[arg-type] # one of the four, as the tables above say
        path=path,
        operation=operation,
        summary=summary,
        endpoint=endpoint,
        permission=permission,
        answers=answers,
        parameters=(*named, AFTER) if lists else named,
        body={JSON: body} if body else {},
        problems=tuple(sorted(problems)),
        tag="tenants" if "tenants" in path else "people",
        known=known,
    )


async def _read(request: Request, model: type[M], *, empty: bool = False) -> M:
    """The body as `model`; `empty`: no body means its defaults. Raises InvalidRequestError with pointers."""
    headers = request.headers
    if empty and headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return model()
    return await command(request, model)


def _place(tenant: str) -> TenantScope | None:
    return None if tenant == EVERYWHERE else TenantScope(tenant)


def _changes(body: TenantChanges) -> Changes:
    return Changes(body.thresholds, body.approval_policy, body.limits)


def _answer(status: int, document: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    return json_answer(status, document.model_dump(mode="json"), headers)
