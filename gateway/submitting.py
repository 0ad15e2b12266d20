"""What the HTTP door takes in: single events, batches, labels, and events that are only tried out.

Promises: one answer per item of a batch, in order, whatever its neighbours are; a caller that prefers to wait gets its
decision, or 202 at the deadline; a refusal is counted, and audited once its sender is known; no event of a paused
tenant is taken in. What an event is, and whether it is accepted, `Intake` says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from contracts.events import Kind, event_id_of, parse_event
from contracts.failures import (
    IdempotencyConflictError,
    InvalidMetadataError,
    RiskfleetError,
    TenantIsolationError,
    TenantPausedError,
    UnsupportedMediaTypeError,
    classify,
    problem_document,
)
from contracts.identity import Permission
from contracts.lifecycle import Status
from contracts.messages import JSON
from contracts.outcomes import STATUS_OF, Decision, Outcome
from contracts.ports import Credentials, Ids, Pauses, Simulator
from contracts.telemetry import current_correlation
from contracts.tenancy import TenantScope
from gateway.batch import MAX_BATCH_BYTES, split_csv, split_json_array, split_ndjson
from gateway.cloudevents import BATCH, STRUCTURED, http_attributes
from gateway.intake import Admission, Intake, Refusal, Submission, foresee
from gateway.labelling import LabelDesk
from gateway.reading import one_query
from gateway.refusals import RefusalLog
from gateway.waiting import Expected, Wait, Waiting, preferred_wait
from gateway.web import (
    CORRELATION,
    check_json,
    json_answer,
    media_type,
    one_header,
    problem,
    read_body,
    read_json,
    tenant_of,
)

NDJSON: Final = "application/x-ndjson"
CSV: Final = "text/csv"
REPLAYED: Final = "Idempotency-Replayed"
APPLIED: Final = "Preference-Applied"
_PAUSED_RETRY_S: Final = 30
"""When a sender asks again while nobody knows how long its tenant is paused."""

_ANSWER = ConfigDict(frozen=True, extra="forbid")


class Receipt(BaseModel):
    """An accepted event. `decision` is there once there is one."""

    model_config = _ANSWER
    event_id: str
    id: str
    kind: Literal["risk", "compliance"]
    status: Status
    correlation_id: str
    decision: Decision | None = None


class BatchItem(BaseModel):
    """What became of one item: `status` is the HTTP status that it would have had alone; `problem` from 400 on."""

    model_config = _ANSWER
    index: int = Field(ge=0)
    status: int = Field(ge=200, le=599)
    event_id: str | None = None
    id: str | None = None
    kind: Literal["risk", "compliance"] | None = None
    correlation_id: str | None = None
    replayed: bool = False
    decision: Decision | None = None
    problem: dict[str, Any] | None = None


class BatchView(BaseModel):
    """One result per item, in the order of the items."""

    model_config = _ANSWER
    results: tuple[BatchItem, ...]


class LabelReceipt(BaseModel):
    """An accepted label."""

    model_config = _ANSWER
    label_id: str
    event_id: str
    correlation_id: str


@dataclass(frozen=True, slots=True)
class SubmittingPorts:
    """What is submitted to; a part that is None is not offered by this process."""

    credentials: Credentials
    ids: Ids
    waiting: Waiting | None
    labels: LabelDesk | None
    simulator: Simulator | None
    pauses: Pauses | None = None


class Submitting:
    """The endpoints that take something in."""

    def __init__(self, intake: Intake, ports: SubmittingPorts, refusals: RefusalLog) -> None:
        self._intake = intake
        self._ports = ports
        self._refusals = refusals

    async def post_risk(self, request: Request) -> Response:
        """POST /v1/risk."""
        return await self._single(request, Kind.RISK)

    async def post_compliance(self, request: Request) -> Response:
        """POST /v1/compliance."""
        return await self._single(request, Kind.COMPLIANCE)

    async def post_event(self, request: Request) -> Response:
        """POST /v1/events: the body names the kind."""
        return await self._single(request, None)

    async def post_batch(self, request: Request) -> Response:
        """POST /v1/events/batch."""
        scope: TenantScope | None = None
        try:
            scope = await tenant_of(request, self._ports.credentials, Permission.EVENTS_SUBMIT)
            await self._check_paused(scope)
            template = _template(request, scope, _kind(request))
            items = await _items(request)
            template = replace(template, structured=media_type(request) == BATCH)
        except RiskfleetError as error:
            self._refusals.note(scope, error, "http", audited=scope is not None)
            raise
        verdicts = await self._intake.admit_batch(items, template)
        return json_answer(200, {"results": [_result(index, verdict) for index, verdict in enumerate(verdicts)]})

    async def post_simulation(self, request: Request) -> Response:
        """POST /v1/simulate."""
        scope = await tenant_of(request, self._ports.credentials, Permission.EVENTS_SIMULATE)
        event = parse_event(await read_json(request))
        if event.tenant_id is not None and event.tenant_id != scope.tenant_id:
            raise TenantIsolationError(pointers=(("/tenant_id", "must be the caller's own, or left out"),))
        assert self._ports.simulator is not None  # else the call is not routed
        decision = await self._ports.simulator.simulate(scope, event)
        return json_answer(200, decision.model_dump(mode="json"))

    async def post_label(self, request: Request) -> Response:
        """POST /v1/labels."""
        scope: TenantScope | None = None
        try:
            scope = await tenant_of(request, self._ports.credentials, Permission.LABELS_SUBMIT)
            check_json(request)
            body = await read_body(request)
        except RiskfleetError as error:
            self._refusals.note(scope, error, "http", audited=scope is not None)
            raise
        assert self._ports.labels is not None  # else the call is not routed
        verdict = await self._ports.labels.accept(scope, body, "http")
        if isinstance(verdict, Refusal):
            return problem(request, verdict.error, event_id=verdict.event_id, id=verdict.identity)
        return json_answer(
            202,
            {
                "label_id": verdict.label_id,
                "event_id": verdict.event_id,
                "correlation_id": current_correlation().correlation_id,
            },
            {"Location": f"/v1/events/{verdict.event_id}"},
        )

    async def _single(self, request: Request, kind: Kind | None) -> Response:
        scope: TenantScope | None = None
        try:
            scope = await tenant_of(request, self._ports.credentials, Permission.EVENTS_SUBMIT)
            await self._check_paused(scope)
            submission = await _filled(request, _template(request, scope, kind))
        except RiskfleetError as error:
            # Before authentication: metric and log only, or strangers could write the audit full.
            self._refusals.note(scope, error, "http", audited=scope is not None)
            raise
        seconds = preferred_wait(request.headers.getlist("prefer"))
        if seconds is not None and self._ports.waiting is not None:
            return await self._waited(request, submission, seconds, self._ports.waiting)
        return _answered(request, await self._intake.admit(submission))

    async def _check_paused(self, scope: TenantScope) -> None:
        """Raise TenantPausedError while the tenant is paused; the operator's words are not for the tenant."""
        if self._ports.pauses is None:
            return
        (notice,) = await self._ports.pauses.doors([scope])
        if notice is not None:
            seconds = _PAUSED_RETRY_S if notice.seconds is None else max(math.ceil(notice.seconds), 1)
            raise TenantPausedError(retry_after_s=seconds)

    async def _waited(self, request: Request, submission: Submission, seconds: int, waiting: Waiting) -> Response:
        foreseen = self._foreseen(submission)
        if foreseen is None:
            return _answered(request, await self._intake.admit(submission))
        named, expected = foreseen
        async with waiting.registered(expected, seconds) as wait:
            if wait is None:
                return _answered(request, await self._intake.admit(submission))
            verdict = await self._intake.admit(replace(named, reply_to=waiting.address))
            answer = await _decided(request, verdict, wait)
        answer.headers[APPLIED] = f"wait={seconds}"
        return answer

    def _foreseen(self, submission: Submission) -> tuple[Submission, Expected] | None:
        """What the intake will make of a submission: nobody can register for an event that has no id yet.

        None for one that will be refused: the intake says why, and counts it.
        """
        found = foresee(submission)
        if found is None:
            return None
        identity = found.identity
        if identity is None:
            identity = self._ports.ids.uuid7()
            submission = replace(submission, fallback_identity=identity)
        return submission, Expected(submission.scope, event_id_of(submission.scope, identity), found.body_digest)


async def _decided(request: Request, verdict: Admission | Refusal, wait: Wait) -> Response:
    """The answer to an event once it is decided, or 202 at the deadline."""
    if isinstance(verdict, Refusal) or verdict.decision is not None:
        return _answered(request, verdict)
    try:
        # The body is read, so the next message can only be that the caller went away.
        row = await wait.decision(request.receive())
    except IdempotencyConflictError as error:
        return problem(request, error, event_id=verdict.event_id, id=verdict.identity)
    if row is None:
        return _answered(request, verdict)
    return _answered(request, replace(verdict, status=STATUS_OF[Outcome(row.outcome)], decision=row))


def _template(request: Request, scope: TenantScope, kind: Kind | None) -> Submission:
    return Submission(
        scope=scope,
        kind=kind,
        body=b"",
        identity_header=one_header(request, "idempotency-key"),
        correlation_id=request.headers.get("x-correlation-id"),
        traceparent=request.headers.get("traceparent"),
        source="http",
        allow_generated_identity=True,
    )


async def _filled(request: Request, template: Submission) -> Submission:
    """The submission of a single POST: plain JSON, or a CloudEvent in structured or binary mode."""
    check_json(request)
    structured = media_type(request) == STRUCTURED
    attributes = None if structured else http_attributes(request.headers)
    return replace(template, body=await read_body(request), structured=structured, attributes=attributes)


def _kind(request: Request) -> Kind | None:
    text = one_query(request, "kind")
    if text is not None and text not in tuple(Kind):
        raise InvalidMetadataError("kind is risk or compliance; leave it out when every item names its own")
    return None if text is None else Kind(text)


async def _items(request: Request) -> Sequence[bytes | RiskfleetError]:
    """The items of a batch. Raises UnsupportedMediaTypeError for a type that no batch has."""
    media = media_type(request)
    if media not in (JSON, NDJSON, CSV, BATCH):
        raise UnsupportedMediaTypeError(f"a batch is {JSON}, {NDJSON}, {CSV} or {BATCH}")
    body = await read_body(request, MAX_BATCH_BYTES)
    if media == NDJSON:
        return split_ndjson(body)
    if media == CSV:
        return split_csv(body, request.query_params.getlist("map"))
    return split_json_array(body)


def _answered(request: Request, verdict: Admission | Refusal) -> Response:
    if isinstance(verdict, Refusal):
        return problem(request, verdict.error, event_id=verdict.event_id, id=verdict.identity)
    document: dict[str, Any] = {
        "event_id": verdict.event_id,
        "id": verdict.identity,
        "kind": verdict.kind,
        "status": verdict.status,
        "correlation_id": verdict.correlation_id,
    }
    headers = {
        "Location": f"/v1/events/{verdict.event_id}",
        CORRELATION: verdict.correlation_id,  # a CloudEvent's own, where it brought one
    }
    if verdict.replayed:
        headers[REPLAYED] = "true"
    if verdict.decision is None:
        return json_answer(202, document, headers)
    return json_answer(200, document | {"decision": orjson.Fragment(verdict.decision.decision)}, headers)


def _result(index: int, verdict: Admission | Refusal) -> dict[str, Any]:
    if isinstance(verdict, Refusal):
        document = problem_document(verdict.error, event_id=verdict.event_id, id=verdict.identity)
        named = {"event_id": verdict.event_id, "id": verdict.identity}
        return {
            "index": index,
            "status": classify(verdict.error).status,
            **{name: value for name, value in named.items() if value is not None},
            "problem": document,
        }
    result: dict[str, Any] = {
        "index": index,
        "status": 202 if verdict.decision is None else 200,
        "event_id": verdict.event_id,
        "id": verdict.identity,
        "kind": verdict.kind,
        "correlation_id": verdict.correlation_id,
        "replayed": verdict.replayed,
    }
    return result if verdict.decision is None else result | {"decision": orjson.Fragment(verdict.decision.decision)}
