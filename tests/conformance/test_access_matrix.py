"""Every call of both OpenAPI documents answers every caller as the documents and the table of roles declare."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import httpx
import pytest

from contracts.failures import ConflictError
from contracts.identity import Principal
from contracts.tenancy import TenantScope
from contracts.topology import Layouts
from gateway.control.app import create_control
from gateway.control.app import openapi_document as operator_document
from gateway.control.desk import Desk
from gateway.http import create_app, openapi_document
from governance.passwords import Passwords
from governance.postgres.commands import PeoplePolicy, PeoplePorts
from governance.postgres.people import People
from tests.conformance.access_matrix import (
    FOREIGN,
    OWN,
    SHARED,
    UNKNOWN,
    Caller,
    Operation,
    callers,
    cases,
    declared,
    operations,
)
from tests.fakes import CountingIds, RecordingTelemetry, SteppingClock, event_body
from tests.fakes_doors import WholeDoor, health_door
from tests.integration.fleet_fixture import show

NO_TENANT = "no such tenant is known to you"


class Behind:
    """The rooms behind the desk: whatever is asked of them is a conflict, so that nothing but the desk answers 401,
    403, or 404 for a tenant. `asked` counts the questions.
    """

    def __init__(self) -> None:
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        if name == "tenants":
            return self

        async def refuse(*_: object, **__: object) -> None:
            self.asked += 1
            raise ConflictError(f"{name} was reached")

        return refuse


class Wallet:
    """The port Credentials: a bearer credential is the caller's name."""

    def __init__(self, principals: Mapping[str, Principal]) -> None:
        self._principals = principals

    async def principal(self, bearer: str) -> Principal | None:
        return self._principals.get(bearer)


class Tenants:
    """Which tenants exist; counts the look-ups."""

    def __init__(self) -> None:
        self.looked = 0

    async def exists(self, scope: TenantScope) -> bool:
        self.looked += 1
        return scope in (OWN, FOREIGN)


BODIES = {
    "createTenant": b'{"tenant": "globex", "name": "G"}',
    "createUser": b'{"user": "somebody", "name": "S"}',
    "grantRole": b'{"tenant": "acme", "role": "VIEWER"}',
    "revokeRole": b'{"tenant": "acme", "role": "VIEWER"}',
}
"""What a room reads before it asks who calls; the other calls may come with nothing in them."""


class Surface:
    """One application, its document, and a client for each caller."""

    def __init__(self, app: Any, described: Mapping[str, Any]) -> None:
        self.app, self.document = app, described
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door")

    async def call(self, operation: Operation, caller: Caller, place: str | None) -> httpx.Response:
        path = operation.path
        values = {
            "tenant": place or "",
            "kind": "model",
            "name": "m",
            "version": "1",
            "model": "m",
            "event_id": "0" * 32,
        }
        values |= {"user": "somebody", "key": "rfk_000000000000", "letter_id": "x", "request_id": "x", "place": "doors"}
        for name, value in values.items():
            path = path.replace(f"{{{name}}}", value)
        assert "{" not in path, f"give the matrix a value for {path}"
        headers = {"Authorization": f"Bearer {caller.name}"} if caller.principal else {}
        if operation.body is not None:
            headers["Content-Type"] = operation.body
        content = BODIES.get(operation.name, b"{}") if operation.body else None
        return await self.client.request(operation.method, path, headers=headers, content=content)


class Unreached:
    """In place of the database: whoever comes so far was let through, which counts as one question."""

    def __init__(self, behind: Behind) -> None:
        self._behind = behind

    async def connect(self) -> None:
        self._behind.asked += 1
        raise ConflictError("the database was reached")


def control(people: Callable[[Behind], Any] | None = None) -> tuple[Surface, Behind, Tenants]:
    behind, tenants = Behind(), Tenants()
    wallet = Wallet({caller.name: caller.principal for caller in callers() if caller.principal})
    desk = Desk(
        credentials=wallet,
        exists=tenants.exists,
        gate=behind,  # type: ignore[arg-type] # nothing is asked of them that a conflict does not answer
        people=people(behind) if people else cast("Any", behind),
        approvals=behind,  # type: ignore[arg-type]
        looking=behind,  # type: ignore[arg-type]
        letters=cast("Any", behind),
        redecider=cast("Any", behind),
        pauses=behind,  # type: ignore[arg-type]
        telemetry=RecordingTelemetry(),
        clock=SteppingClock(),
        committed=lambda: None,
    )
    app = create_control(desk, health_door(), CountingIds())
    return Surface(app, json.loads(operator_document())), behind, tenants


def seen(response: httpx.Response) -> str:
    """What a response says about access: 404 counts only where it speaks of the tenant."""
    if response.status_code in (401, 403):
        return str(response.status_code)
    if response.status_code == 404 and response.json().get("detail") == NO_TENANT:
        return "404"
    return "allowed"


def knows_shared(operation: Operation) -> bool:
    """Whether a call of the operator API knows what holds for the whole installation: registry, halts, pauses."""
    return any(room in operation.path for room in ("/registry", "/halts", "/pauses"))


@pytest.fixture
async def operator() -> AsyncIterator[tuple[Surface, Behind, Tenants]]:
    surface, behind, tenants = control()
    yield surface, behind, tenants
    await surface.client.aclose()


async def test_the_operator_api_answers_every_caller_as_declared(operator: tuple[Surface, Behind, Tenants]) -> None:
    surface, behind, _ = operator
    wrong, counts = [], Counter[str]()
    for operation, caller, place in cases(surface.document):
        want = declared(operation, caller, place, shared=knows_shared(operation))
        before = behind.asked
        found = seen(await surface.call(operation, caller, place))
        want = found if want == "open" else want
        counts[want] += 1
        if found != want:
            wrong.append(f"{operation.method} {operation.path} by {caller.name} in {place}: {found}, declared {want}")
        elif found != "allowed" and not operation.open:
            assert behind.asked == before, f"{operation.name} asked before it refused"
    number = len(operations(surface.document))
    show(f"operator API: {number} calls, {sum(counts.values())} cells as declared: {dict(counts)}")
    show(table(surface.document))
    assert wrong == []


def real_people(behind: Behind) -> People:
    """The room itself, up to the database, so that what it asks for is compared with what its calls declare."""
    passwords = Passwords(memory_kib=64, passes=1)
    ports = PeoplePorts(
        cast("Any", Unreached(behind)), SteppingClock(), CountingIds(), passwords, Layouts.first(1), None, Broker()
    )
    return People(ports, PeoplePolicy(b"p" * 32, failed_login_s=0))


class Broker:
    """The broker's management, which nobody reaches without the database."""

    async def open_upstream(self, scope: TenantScope, user: str, password: str) -> None:
        raise AssertionError(scope)

    async def suspend_upstream(self, user: str) -> None:
        raise AssertionError(user)

    async def resume_upstream(self, scope: TenantScope, user: str) -> None:
        raise AssertionError(scope)


async def test_what_the_rooms_ask_for_is_what_their_calls_declare() -> None:
    """The desk lets in by the declaration; a room that wants more would refuse those whom the documents let in.

    Calls without a permission are about oneself: whom they refuse stands in their summary.
    """
    surface, behind, _ = control(real_people)
    wrong, reached = [], Counter[str]()
    for operation, caller, place in cases(surface.document):
        if operation.permission is None or not PEOPLE.fullmatch(operation.path):
            continue
        before = behind.asked
        want = declared(operation, caller, place, shared=knows_shared(operation))
        found = seen(await surface.call(operation, caller, place))
        if found != want:
            wrong.append(f"{operation.name} by {caller.name} in {place}: {found}, declared {want}")
        reached[operation.name] += behind.asked > before
    await surface.client.aclose()
    assert wrong == []
    assert {"setBrokerPassword", "suspendTenant", "limitTenant", "createKey", "revokeKey"} <= set(+reached)


PEOPLE = re.compile(r"/ops/v1/(users.*|tenants(/{tenant}(/(limits|suspend|resume|broker-.*|keys.*))?)?)")


def table(described: Mapping[str, Any]) -> str:
    """Calls × roles in an own tenant, for people to read."""
    own = [caller for caller in callers() if caller.name.endswith(" own") or caller.name.startswith("key")]
    lines = ["call".ljust(34) + " ".join(caller.name.replace(" own", "").ljust(11) for caller in own)]
    for operation in sorted(operations(described), key=lambda o: (o.path, o.method)):
        place = OWN.tenant_id if "{tenant}" in operation.path else None
        cells = (declared(operation, caller, place, shared=knows_shared(operation)) for caller in own)
        lines.append(operation.name.ljust(34) + " ".join(("yes" if c == "allowed" else c).ljust(11) for c in cells))
    return "\n".join(lines)


async def test_a_foreign_tenant_looks_and_costs_like_one_that_does_not_exist(
    operator: tuple[Surface, Behind, Tenants],
) -> None:
    """The same status, the same document but for the path, and not one look-up more or less."""
    surface, behind, tenants = operator
    outsider = next(caller for caller in callers() if caller.name == "ADMIN own")
    for operation in operations(surface.document):
        if "{tenant}" not in operation.path:
            continue
        answers = []
        for place in (FOREIGN.tenant_id, UNKNOWN.tenant_id, "NOT A TENANT"):
            response = await surface.call(operation, outsider, place)
            body = response.json()
            body.pop("instance")
            body.pop("correlation_id")
            answers.append((response.status_code, json.dumps(body, sort_keys=True)))
        assert len(set(answers)) == 1, operation.name
        assert answers[0][0] == 404
    assert (behind.asked, tenants.looked) == (0, 0)


async def test_the_ingest_gateway_answers_every_caller_as_declared() -> None:
    whole = WholeDoor()
    wallet = Wallet({caller.name: caller.principal for caller in callers() if caller.principal})
    door, parts = replace(whole.ports, credentials=wallet), whole.parts
    app = create_app(parts.intake, door, parts.refusals, health_door(), layouts=Layouts.first(parts.partitions))
    described = json.loads(openapi_document())
    surface, wrong, counts = Surface(app, described), [], Counter[str]()
    for operation, caller, _ in cases(described):
        want = declared(operation, caller, None, shared=False)
        if want == "allowed" and caller.principal is not None and caller.principal.scope is None:
            want = "403"  # the gateway's tenant is the credential's: a credential of no tenant has no place here
        found = seen(await surface.call(operation, caller, None))
        want = found if want == "open" else want
        counts[want] += 1
        if found != want:
            wrong.append(f"{operation.method} {operation.path} by {caller.name}: {found}, declared {want}")
    show(
        f"ingest gateway: {len(operations(described))} calls, {sum(counts.values())} cells as declared: {dict(counts)}"
    )
    assert wrong == []
    body = json.dumps(json.loads(event_body()) | {"tenant_id": FOREIGN.tenant_id}).encode()
    for path in ("/v1/risk", "/v1/events", "/v1/simulate"):
        answer = await surface.client.post(
            path,
            content=body,
            headers={"Authorization": "Bearer key SERVICE", "Content-Type": "application/json"},
        )
        assert (answer.status_code, answer.json()["type"].rsplit(":", 1)[1]) == (403, "foreign-tenant"), path
    await surface.client.aclose()


def test_the_matrix_can_fail() -> None:
    operation = Operation("GET", "/ops/v1/tenants/{tenant}/x", "x", None, False, False, None)
    nobody, no_grant = callers()[:2]
    assert declared(operation, nobody, OWN.tenant_id, shared=False) == "401"
    surface, _, _ = control()
    approve = next(o for o in operations(surface.document) if o.name.lower().startswith("approve"))
    assert declared(approve, no_grant, OWN.tenant_id, shared=False) == "404"
    by_name = {caller.name: caller for caller in callers()}
    assert declared(approve, by_name["key SERVICE"], OWN.tenant_id, shared=False) == "403"
    assert declared(approve, by_name["ADMIN own"], OWN.tenant_id, shared=False) == "403"
    assert declared(approve, by_name["APPROVER own"], OWN.tenant_id, shared=False) == "allowed"
    assert declared(approve, by_name["APPROVER own"], FOREIGN.tenant_id, shared=False) == "404"
    assert declared(approve, by_name["APPROVER own"], SHARED, shared=True) == "403"
