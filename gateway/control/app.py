"""The operator API's ASGI application: its calls, counted, with its own OpenAPI document.

Promises: every call is in the document with the permission that it needs, and nothing else is routed but health and
metrics. Nothing is connected or started by building it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from contracts.failures import RiskfleetError, classify
from contracts.ports import Ids, Telemetry
from contracts.telemetry import OPERATOR_CALLS, Measurement
from gateway.calls import Call, Endpoint, openapi, routes
from gateway.control import approvals, looking, people, registry
from gateway.control.desk import Desk
from gateway.health import HealthDoor, health_routes
from gateway.web import application, json_answer

TITLE: Final = "riskfleet operator API"
ABOUT: Final = (
    "Registry, approvals, people, tenants and what operators look at. Every command needs a reason, acts in the name "
    "of a person, and is audited in its own transaction. A tenant that is not yours looks like one that does not exist."
)


def operator_calls(desk: Desk) -> list[Call]:
    """Every call of the operator API."""
    return [*registry.calls(desk), *approvals.calls(desk), *looking.calls(desk), *people.calls(desk)]


def document(calls: Sequence[Call], version: str) -> dict[str, object]:
    """The OpenAPI 3.1 document of the operator API."""
    return openapi(TITLE, version, ABOUT, calls)


def create_control(desk: Desk, health: HealthDoor, ids: Ids, *, version: str) -> Starlette:
    """The application over all calls."""
    calls = operator_calls(desk)
    described = document(calls, version)

    async def openapi_json(_: Request) -> Response:
        return json_answer(200, described)

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
