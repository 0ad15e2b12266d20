"""The operator API's ASGI application: its calls, counted, with its own OpenAPI document.

Promises: every call is in the document with the permission that it needs, and nothing else is routed but health and
metrics. Nothing is connected or started by building it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from contracts.failures import RiskfleetError, classify
from contracts.messages import JSON
from contracts.ports import Ids, Telemetry
from contracts.telemetry import OPERATOR_CALLS, Measurement
from gateway.calls import Call, Endpoint, openapi, routes
from gateway.control import approvals, deadletters, looking, pauses, people, registry
from gateway.control.desk import Desk
from gateway.documents import API_VERSION, document_bytes
from gateway.health import HealthDoor, health_routes
from gateway.web import Application, application

TITLE: Final = "riskfleet operator API"
ABOUT: Final = (
    "Registry, approvals, dead letters, people, tenants and what operators look at. Every command acts in the name of "
    "a person and is audited in its own transaction. A tenant that is not yours looks like one that does not exist."
)


def operator_calls(desk: Desk) -> list[Call]:
    """Every call of the operator API."""
    rooms = (registry, approvals, looking, deadletters, pauses, people)
    return [call for room in rooms for call in room.calls(desk)]


def openapi_document() -> bytes:
    """The OpenAPI 3.1 document of the operator API; it depends on no adapter."""
    absent: Any = None
    desk = Desk(absent, absent, absent, absent, absent, absent, absent, absent, absent, absent, absent, absent)
    return document_bytes(openapi(TITLE, API_VERSION, ABOUT, operator_calls(desk)))


def create_control(desk: Desk, health: HealthDoor, ids: Ids) -> Application:
    """The application over all calls."""
    calls = operator_calls(desk)
    described = openapi_document()

    async def openapi_json(_: Request) -> Response:
        return Response(described, media_type=JSON)

    described_call = Call(
        "GET", "/ops/v1/openapi.json", "getOpenapi", "This document", openapi_json, None, {}, tag="documents"
    )
    counted = [replace(call, endpoint=_counted(call, desk.telemetry)) for call in calls]
    return application([*routes([*counted, described_call]), *health_routes(health)], ids)


def _counted(call: Call, telemetry: Telemetry) -> Endpoint:
    """The endpoint, counted by call and result class: the label set stays small."""

    @functools.wraps(call.endpoint)
    async def endpoint(request: Request) -> Response:
        status = 500
        try:
            response = await call.endpoint(request)
            status = response.status_code
            return response
        except RiskfleetError as error:
            status = classify(error).status
            raise
        finally:
            telemetry.record(Measurement(OPERATOR_CALLS, labels={"call": call.operation, "result": str(status)}))

    return endpoint
