"""The calls of approvals: the queue, one approval with its explanation, and what people do about it.

Promises: every command names the revision that its sender saw, so that a screen that is out of date decides nothing;
every command's message and record go out at once. Holds no rule of its own: `governance.postgres.approvals` does.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from contracts.identity import Permission
from contracts.messages import JSON
from gateway.calls import Answer, Call, Endpoint, Parameter, Schema
from gateway.control.desk import Desk
from gateway.control.parameters import (
    AFTER,
    EVENT,
    TENANT,
    choice,
    choice_parameter,
    command,
    event_of,
    limit_parameter,
    moment_of,
    number,
    one,
    words,
)
from gateway.web import json_answer
from governance.approvals import (
    MAX_REASON,
    Answered,
    Approval,
    ApprovalPage,
    ApprovalReport,
    ApprovalStatus,
    ApprovalView,
    Cause,
)
from governance.postgres.approvals import MAX_PAGE

_QUEUE: Final = "/ops/v1/tenants/{tenant}/approvals"
_ONE: Final = _QUEUE + "/{event_id}"
_REPORT: Final = "/ops/v1/tenants/{tenant}/approvals-report"
_REPORT_DAYS: Final = 30
_TAG: Final = "approvals"
_STRICT: Final = ConfigDict(frozen=True, extra="forbid", strict=True)
_COMMAND_PROBLEMS: Final = (400, 404, 409, 413, 415, 422, 503)

Revision = Annotated[int, Field(ge=1, lt=2**31, description="The revision that the sender saw.")]
Why = Annotated[str, Field(min_length=1, max_length=MAX_REASON)]


class ApprovalCommand(BaseModel):
    """A command that needs no reason: claim, release."""

    model_config = _STRICT
    revision: Revision
    reason: Annotated[str, Field(max_length=MAX_REASON)] = ""


class ReasonedCommand(BaseModel):
    """A command with its reason: approve, reject; for a note, the reason is the note."""

    model_config = _STRICT
    revision: Revision
    reason: Why


class OpeningCommand(BaseModel):
    """Ask people about a decided event again."""

    model_config = _STRICT
    cause: Literal["reopened", "contested"]
    reason: Why


def calls(desk: Desk) -> list[Call]:
    """The calls of this room."""
    door = _Door(desk)
    status = choice_parameter("status", "Default: open.", words(ApprovalStatus))
    page = (status, AFTER, limit_parameter(MAX_PAGE))
    since = Parameter(
        "since", "query", f"From when; default: {_REPORT_DAYS} days.", {"type": "string", "format": "date-time"}
    )
    return [
        _read(_QUEUE, "listApprovals", "Approvals, the most urgent first", door.queue, ApprovalPage, *page),
        _read(_ONE, "showApproval", "One approval, its votes, and the decision", door.show, ApprovalView, EVENT),
        _read(_REPORT, "reportApprovals", "How approvals were decided", door.report, ApprovalReport, since),
        _act("claim", "Say that one is looking, for 15 minutes", door.claim, ApprovalCommand, Approval),
        _act("release", "Give one's claim back", door.release, ApprovalCommand, Approval),
        _act("note", "Add a note for whoever decides", door.note, ReasonedCommand, Approval),
        _act("approve", "Approve, or give the first of two votes", door.approve, ReasonedCommand, Answered),
        _act("reject", "Reject", door.reject, ReasonedCommand, Answered),
        _act("open", "Ask people about a decided event again", door.open, OpeningCommand, Approval),
    ]


class _Door:
    """The endpoints."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def queue(self, request: Request) -> Response:
        _, scope = await self._desk.tenant(request, Permission.APPROVALS_READ)
        status = ApprovalStatus(choice(request, "status", words(ApprovalStatus), ApprovalStatus.OPEN))
        limit = number(request, "limit", 50, 1, MAX_PAGE)
        return _answer(await self._desk.approvals.queue(scope, status, after=one(request, "after"), limit=limit))

    async def show(self, request: Request) -> Response:
        _, scope = await self._desk.tenant(request, Permission.APPROVALS_READ)
        return _answer(await self._desk.approvals.show(scope, event_of(request)))

    async def report(self, request: Request) -> Response:
        _, scope = await self._desk.tenant(request, Permission.APPROVALS_READ)
        since = moment_of(request, "since") or self._desk.clock.now() - timedelta(days=_REPORT_DAYS)
        return _answer(await self._desk.approvals.report(scope, since))

    async def claim(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.APPROVALS_DECIDE)
        event_id, body = event_of(request), await command(request, ApprovalCommand)
        return self._done(await self._desk.approvals.claim(caller, scope, event_id, revision=body.revision))

    async def release(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.APPROVALS_DECIDE)
        event_id, body = event_of(request), await command(request, ApprovalCommand)
        return self._done(await self._desk.approvals.release(caller, scope, event_id, revision=body.revision))

    async def note(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.APPROVALS_OPEN)
        event_id, body = event_of(request), await command(request, ReasonedCommand)
        return self._done(
            await self._desk.approvals.note(caller, scope, event_id, revision=body.revision, note=body.reason)
        )

    async def approve(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.APPROVALS_DECIDE)
        event_id, body = event_of(request), await command(request, ReasonedCommand)
        return self._done(
            await self._desk.approvals.approve(caller, scope, event_id, revision=body.revision, reason=body.reason)
        )

    async def reject(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.APPROVALS_DECIDE)
        event_id, body = event_of(request), await command(request, ReasonedCommand)
        return self._done(
            await self._desk.approvals.reject(caller, scope, event_id, revision=body.revision, reason=body.reason)
        )

    async def open(self, request: Request) -> Response:
        caller, scope = await self._desk.tenant(request, Permission.APPROVALS_OPEN)
        event_id, body = event_of(request), await command(request, OpeningCommand)
        return self._done(
            await self._desk.approvals.open(caller, scope, event_id, cause=Cause(body.cause), reason=body.reason)
        )

    def _done(self, document: BaseModel) -> Response:
        """A command committed: its messages wait in the outbox."""
        self._desk.committed()
        return _answer(document)


_PERMISSION_OF: Final = {"note": Permission.APPROVALS_OPEN, "open": Permission.APPROVALS_OPEN}


def _act(action: str, summary: str, endpoint: Endpoint, body: Schema, answer: Schema) -> Call:
    return Call(
        "POST",
        f"{_ONE}/{action}",
        f"{action}Approval",
        summary,
        endpoint,
        _PERMISSION_OF.get(action, Permission.APPROVALS_DECIDE),
        {200: Answer("Done and recorded", answer)},
        (TENANT, EVENT),
        {JSON: body},
        _COMMAND_PROBLEMS,
        _TAG,
    )


def _read(path: str, operation: str, summary: str, endpoint: Endpoint, answer: Schema, *parameters: Parameter) -> Call:
    return Call(
        "GET",
        path,
        operation,
        summary,
        endpoint,
        Permission.APPROVALS_READ,
        {200: Answer("What is there now", answer)},
        (TENANT, *parameters),
        problems=(404, 422, 503),
        tag=_TAG,
    )


def _answer(document: BaseModel) -> Response:
    return json_answer(200, document.model_dump(mode="json"))
