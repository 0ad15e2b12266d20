"""The calls of operators who look: one event, an event's audit records, and how models did that are tried.

Read only. Promises: no payload is in any answer; what another tenant owns is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from contracts.failures import InvalidMetadataError
from contracts.identity import Permission
from gateway.calls import Answer, Call, Endpoint, Parameter, Schema
from gateway.control.desk import Desk
from gateway.control.parameters import (
    EVENT,
    TENANT,
    event_id,
    event_of,
    limit_parameter,
    moment_of,
    number,
    one,
)
from gateway.web import json_answer
from governance.postgres.looking import MAX_RECORDS, ChainPage, EventView
from governance.trials import TrialReport

_TENANT: Final = "/ops/v1/tenants/{tenant}"
_DAYS: Final = 7


@dataclass(frozen=True, slots=True)
class _Reading:
    endpoint: Endpoint
    permission: Permission
    answer: Schema
    parameters: tuple[Parameter, ...]


def calls(desk: Desk) -> list[Call]:
    """The calls of this room."""
    door = _Door(desk)
    event = Parameter("event_id", "query", "The event.", {"type": "string", "pattern": "^[0-9a-f]{32}$"}, required=True)
    after = Parameter("after", "query", "`next` of the page before.", {"type": "integer", "minimum": 0})
    since = Parameter("since", "query", f"From when; default: {_DAYS} days.", {"type": "string", "format": "date-time"})
    chain = (event, after, limit_parameter(MAX_RECORDS))
    return [
        _look(
            f"{_TENANT}/events/{{event_id}}",
            "lookAtEvent",
            "Where an event is, and what became of it",
            _Reading(door.event, Permission.EVENTS_READ, EventView, (EVENT,)),
        ),
        _look(
            f"{_TENANT}/audit",
            "listAuditRecords",
            "The audit records of one event, in the order of the chain",
            _Reading(door.records, Permission.AUDIT_READ, ChainPage, chain),
        ),
        _look(
            f"{_TENANT}/trials-report",
            "reportTrials",
            "How models that are tried did beside those that decide",
            _Reading(door.trials, Permission.REGISTRY_READ, TrialReport, (since,)),
        ),
    ]


class _Door:
    """The endpoints."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def event(self, request: Request) -> Response:
        _, scope = await self._desk.tenant(request, Permission.EVENTS_READ)
        return _answer(await self._desk.looking.event(scope, event_of(request)))

    async def trials(self, request: Request) -> Response:
        _, scope = await self._desk.tenant(request, Permission.REGISTRY_READ)
        since = moment_of(request, "since") or self._desk.clock.now() - timedelta(days=_DAYS)
        return _answer(await self._desk.looking.trials(scope, since))

    async def records(self, request: Request) -> Response:
        _, scope = await self._desk.tenant(request, Permission.AUDIT_READ)
        named = one(request, "event_id")
        if named is None:
            raise InvalidMetadataError("name the event: ?event_id=")
        after = number(request, "after", 0, 0, 2**63 - 1)
        limit = number(request, "limit", MAX_RECORDS, 1, MAX_RECORDS)
        return _answer(await self._desk.looking.records(scope, event_id(named), after=after, limit=limit))


def _look(path: str, operation: str, summary: str, reading: _Reading) -> Call:
    return Call(
        "GET",
        path,
        operation,
        summary,
        reading.endpoint,
        reading.permission,
        {200: Answer("What is there now", reading.answer)},
        (TENANT, *reading.parameters),
        problems=(404, 422, 503),
        tag="looking",
    )


def _answer(document: BaseModel) -> Response:
    return json_answer(200, document.model_dump(mode="json"))
