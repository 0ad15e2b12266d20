"""The HTTP door: authenticate, read, admit, answer; and read back what became of an event.

Promises: every error is an RFC 9457 problem document, nothing that a client sends is answered with 500,
every answer carries the correlation id, and a caller sees its own tenant only, since every key is made from
the credential's scope. Nothing is decided here; `Intake` accepts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from contracts.codec import state_from_bytes
from contracts.events import MAX_BODY_BYTES, Kind, event_id_of
from contracts.failures import AuthorizationError, InvalidMetadataError, NotKnownError, RiskfleetError
from contracts.identity import Permission
from contracts.lifecycle import FINAL_VERSION, Status
from contracts.outcomes import STATUS_OF, Outcome
from contracts.ports import Credentials, DecisionRow, Directory, Ids, Ledger, Peek, StateStore
from contracts.telemetry import current_correlation
from contracts.tenancy import TenantScope
from contracts.topology import STAGES
from gateway.health import HealthDoor, health_routes
from gateway.intake import MAX_IDENTITY, Admission, Intake, Refusal, Submission
from gateway.refusals import RefusalLog
from gateway.web import application, authenticate, check_json, json_answer, one_header, problem, read_body

_EVENT_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class HttpPorts:
    """What the HTTP door needs beside the intake."""

    credentials: Credentials
    directory: Directory
    ledger: Ledger
    state_store: StateStore
    ids: Ids


def create_app(
    intake: Intake, ports: HttpPorts, refusals: RefusalLog, health: HealthDoor, *, partitions: int
) -> Starlette:
    """The gateway's ASGI application; nothing is connected or started by building it."""
    door = _Door(intake, ports, refusals, partitions)
    routes: list[BaseRoute] = [
        Route("/v1/risk", door.post_risk, methods=["POST"]),
        Route("/v1/compliance", door.post_compliance, methods=["POST"]),
        Route("/v1/events", door.events, methods=["GET", "POST"]),
        Route("/v1/events/{event_id}", door.get_event, methods=["GET"]),
        Route("/v1/tenant", door.get_tenant, methods=["GET"]),
        *health_routes(health),
    ]
    return application(routes, ports.ids)


class _Door:
    """The endpoints."""

    def __init__(self, intake: Intake, ports: HttpPorts, refusals: RefusalLog, partitions: int) -> None:
        self._intake = intake
        self._ports = ports
        self._refusals = refusals
        self._partitions = partitions

    async def post_risk(self, request: Request) -> Response:
        """POST /v1/risk."""
        return await self._submit(request, Kind.RISK)

    async def post_compliance(self, request: Request) -> Response:
        """POST /v1/compliance."""
        return await self._submit(request, Kind.COMPLIANCE)

    async def events(self, request: Request) -> Response:
        """POST /v1/events (the body names the kind) and GET /v1/events?id= (the sender's own id)."""
        if request.method == "POST":
            return await self._submit(request, None)
        scope = await self._tenant(request, Permission.EVENTS_READ)
        names = request.query_params.getlist("id")
        if len(names) != 1 or not 1 <= len(names[0]) <= MAX_IDENTITY:
            raise InvalidMetadataError(f"name one event: ?id= and 1 to {MAX_IDENTITY} characters")
        return await self._event(scope, event_id_of(scope, names[0]))

    async def get_event(self, request: Request) -> Response:
        """GET /v1/events/{id}."""
        scope = await self._tenant(request, Permission.EVENTS_READ)
        event_id = request.path_params["event_id"]
        if not _EVENT_ID.fullmatch(event_id):
            raise NotKnownError
        return await self._event(scope, event_id)

    async def get_tenant(self, request: Request) -> Response:
        """GET /v1/tenant."""
        scope = await self._tenant(request, Permission.TENANT_READ)
        profile = next((p for p in await self._ports.directory.tenants() if p.scope == scope), None)
        if profile is None:
            raise NotKnownError("the tenant was only just made or is being removed; repeat in a few seconds")
        return json_answer(
            200,
            {
                "tenant_id": scope.tenant_id,
                "name": profile.name,
                "partition": scope.partition(self._partitions),
                "partitions": self._partitions,
                "limits": {"max_body_bytes": MAX_BODY_BYTES},
                "thresholds": profile.thresholds.model_dump(mode="json"),
                "ingest_queue": scope.ingest_queue if profile.broker_user else None,
            },
        )

    async def _submit(self, request: Request, kind: Kind | None) -> Response:
        scope: TenantScope | None = None
        try:
            scope = await self._tenant(request, Permission.EVENTS_SUBMIT)
            check_json(request)
            identity = one_header(request, "idempotency-key")
            body = await read_body(request)
        except RiskfleetError as error:
            # Before authentication: metric and log only, or strangers could write the audit full.
            self._refusals.note(scope, error, "http", audited=scope is not None)
            raise
        correlation = current_correlation()
        verdict = await self._intake.admit(
            Submission(
                scope=scope,
                kind=kind,
                body=body,
                identity_header=identity,
                correlation_id=correlation.correlation_id,
                traceparent=correlation.traceparent,
                source="http",
                allow_generated_identity=True,
            )
        )
        if isinstance(verdict, Refusal):
            return problem(request, verdict.error, event_id=verdict.event_id, id=verdict.identity)
        return _admitted(verdict)

    async def _tenant(self, request: Request, permission: Permission) -> TenantScope:
        """The tenant of the credential. Raises AuthenticationError or AuthorizationError."""
        principal = await authenticate(request, self._ports.credentials)
        if principal.scope is None:
            raise AuthorizationError("the token is bound to no tenant; log in with one")
        if not principal.may(permission, principal.scope):
            raise AuthorizationError(f"the credential does not permit {permission}")
        return principal.scope

    async def _event(self, scope: TenantScope, event_id: str) -> Response:
        key = ((scope, event_id),)
        (row,) = await self._ports.ledger.decisions(key)
        if row is not None:
            return json_answer(200, _decided(event_id, row))
        (peek,) = await self._ports.state_store.peek(key)
        if peek is not None:
            return json_answer(200, _under_way(event_id, peek))
        (known,) = await self._ports.ledger.known(key)
        if not known:
            raise NotKnownError
        return json_answer(200, {"event_id": event_id, "status": Status.RECEIVED, "version": 0, "stage": STAGES[0]})


def _admitted(admission: Admission) -> Response:
    document: dict[str, Any] = {
        "event_id": admission.event_id,
        "id": admission.identity,
        "kind": admission.kind,
        "status": admission.status,
        "correlation_id": admission.correlation_id,
    }
    headers = {"Location": f"/v1/events/{admission.event_id}"}
    if admission.replayed:
        headers["Idempotency-Replayed"] = "true"
    if admission.decision is None:
        return json_answer(202, document, headers)
    return json_answer(200, document | {"decision": orjson.Fragment(admission.decision.decision)}, headers)


def _decided(event_id: str, row: DecisionRow) -> dict[str, Any]:
    state = state_from_bytes(row.state)
    return {
        "event_id": event_id,
        "id": state.event.id,
        "kind": state.KIND,
        "status": STATUS_OF[Outcome(row.outcome)],
        "version": state.n,
        "stage": None,
        "received_at": state.received_at,
        "correlation_id": state.correlation_id,
        "pins": state.created.pins.model_dump(mode="json") if state.created else None,
        "revision": row.revision,
        "decision": orjson.Fragment(row.decision),
        "trail": [entry.model_dump(mode="json") for entry in state.trail],
    }


def _under_way(event_id: str, peek: Peek) -> dict[str, Any]:
    stage = STAGES[peek.version] if peek.version < FINAL_VERSION else None
    document: dict[str, Any] = {
        "event_id": event_id,
        "status": peek.status,
        "version": peek.version,
        "stage": stage,
    }
    if peek.stored is None:
        return document
    state = state_from_bytes(peek.stored)
    return document | {
        "id": state.event.id,
        "kind": state.KIND,
        "received_at": state.received_at,
        "correlation_id": state.correlation_id,
        "pins": state.created.pins.model_dump(mode="json") if state.created else None,
        "trail": [entry.model_dump(mode="json") for entry in state.trail],
    }
