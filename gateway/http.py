"""The ingest gateway's HTTP surface: one table of calls, from which routes, permissions and documents come.

Promises: every error is an RFC 9457 problem document, nothing that a client sends is answered with 500, every answer
carries the correlation id, and the tenant comes from the credential alone. A call whose part this process does not have
is neither routed nor documented. Nothing is decided here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from starlette.applications import Starlette
from starlette.routing import Route

from contracts.events import Event
from contracts.identity import Permission
from contracts.labels import LabelBody
from contracts.messages import JSON
from contracts.outcomes import Decision
from contracts.ports import Credentials, DecisionFeed, Directory, Ids, Ledger, Pauses, Simulator, StateStore
from contracts.topology import Layouts, RunningLayouts
from gateway.calls import Answer, Call, Parameter, Schema, openapi, routes
from gateway.cloudevents import BATCH, STRUCTURED
from gateway.documents import API_VERSION, document_bytes, document_calls
from gateway.health import HealthDoor, health_routes
from gateway.intake import Intake
from gateway.labelling import LabelDesk
from gateway.reading import MAX_PAGE, PAGE, DecisionsView, EventView, Reading, ReadingPorts, TenantView
from gateway.refusals import RefusalLog
from gateway.submitting import (
    APPLIED,
    CSV,
    NDJSON,
    REPLAYED,
    BatchView,
    LabelReceipt,
    Receipt,
    Submitting,
    SubmittingPorts,
)
from gateway.waiting import Waiting
from gateway.web import application
from resilience.monitor import Cause, Health

TITLE: Final = "riskfleet ingest gateway"
ABOUT: Final = (
    "Events in, decisions out. Every submission has an identity: the body's `id`, or the header `Idempotency-Key`. "
    "Repeating one with the same identity is always safe, and is the right thing to do after a 503 or no answer. "
    "Errors are RFC 9457 problem documents; /docs/problems lists every type."
)


@dataclass(frozen=True, slots=True)
class HttpPorts:
    """What the HTTP door needs beside the intake. A part that is None takes its calls with it."""

    credentials: Credentials
    directory: Directory
    ledger: Ledger
    state_store: StateStore
    ids: Ids
    feed: DecisionFeed | None = None
    labels: LabelDesk | None = None
    simulator: Simulator | None = None
    waiting: Waiting | None = None
    pauses: Pauses | None = None


def create_app(
    intake: Intake, ports: HttpPorts, refusals: RefusalLog, health: HealthDoor, *, layouts: RunningLayouts
) -> Starlette:
    """The gateway's ASGI application; nothing is connected or started by building it."""
    return application(routes(ingest_calls(intake, ports, refusals, health, layouts=layouts)), ports.ids)


def ingest_calls(
    intake: Intake, ports: HttpPorts, refusals: RefusalLog, health: HealthDoor, *, layouts: RunningLayouts
) -> tuple[Call, ...]:
    """Every call that these parts make possible, the documents of these very calls included."""
    submitting = Submitting(
        intake,
        SubmittingPorts(ports.credentials, ports.ids, ports.waiting, ports.labels, ports.simulator, ports.pauses),
        refusals,
    )
    reading = Reading(
        ReadingPorts(ports.credentials, ports.directory, ports.ledger, ports.state_store, ports.feed), layouts
    )
    calls = [*_submissions(submitting, waits=ports.waiting is not None)]
    if ports.simulator is not None:
        calls.append(_simulation(submitting))
    if ports.labels is not None:
        calls.append(_labels(submitting))
    calls += _reads(reading)
    if ports.feed is not None:
        calls.append(_feed(reading))
    calls += _health(health)
    calls += document_calls(functools.cache(lambda: openapi_bytes(tuple(calls))))
    return tuple(calls)


def openapi_bytes(calls: tuple[Call, ...]) -> bytes:
    """The OpenAPI 3.1 document of some calls of this door."""
    return document_bytes(openapi(TITLE, API_VERSION, ABOUT, calls))


def openapi_document() -> bytes:
    """The document of a gateway that has every part; it depends on no adapter."""
    absent: Any = None
    present: Any = object()
    ports = HttpPorts(present, present, present, present, present, present, present, present, present)
    return openapi_bytes(ingest_calls(absent, ports, absent, absent, layouts=Layouts.first(1)))


_KEY: Final = Parameter(
    "Idempotency-Key",
    "header",
    "The submission's identity when the body has no `id`; when both are there they agree",
    {"type": "string", "minLength": 1, "maxLength": 256},
)
_BATCH_KEY: Final = Parameter(
    "Idempotency-Key",
    "header",
    "Gives item number i, when it has no `id`, the identity (key, i)",
    {"type": "string", "minLength": 1, "maxLength": 256},
)
_TRACING: Final = (
    Parameter("X-Correlation-ID", "header", "Comes back on every answer and is on every record of the event"),
    Parameter("traceparent", "header", "W3C Trace Context; carried on like the correlation id"),
)
_PREFER: Final = Parameter(
    "Prefer", "header", "`wait=S` (RFC 7240): answer with the decision, or 202 after S seconds; more than 30 is 30"
)
_KIND: Final = Parameter(
    "kind", "query", "The kind of items that name none", {"type": "string", "enum": ["risk", "compliance"]}
)
_MAP: Final = Parameter(
    "map",
    "query",
    "CSV only, repeated: `FIELD=COLUMN`, such as `subject.id=customer`",
    {"type": "array", "items": {"type": "string"}},
)
_ACCEPTED_HEADERS: Final[Mapping[str, str]] = {
    "Location": "Where the event can be followed",
    REPLAYED: "`true`: the same submission was accepted before, and this is its answer",
}
_CLOUDEVENT: Final[Mapping[str, Any]] = {
    "description": (
        "A CloudEvent 1.0 (JSON format) whose data is the event; `type` and `time` fill in what the event leaves out"
    ),
    "type": "object",
    "required": ["specversion", "id", "source", "type"],
    "oneOf": [{"required": ["data"]}, {"required": ["data_base64"]}],
    "properties": {
        "specversion": {"const": "1.0"},
        "id": {"type": "string", "minLength": 1},
        "source": {"type": "string", "minLength": 1},
        "type": {"type": "string", "minLength": 1},
        "time": {"type": "string", "format": "date-time"},
        "datacontenttype": {"type": "string", "pattern": r"^application/([a-z0-9.-]+\+)?json$"},
        "data": {"$ref": "#/components/schemas/Event"},
        "data_base64": {"type": "string", "contentEncoding": "base64", "contentMediaType": JSON},
    },
}
_EVENT_ID: Final[Mapping[str, Any]] = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
_SUBMISSION_PROBLEMS: Final = (400, 413, 415, 422, 429, 503)


def _submissions(submitting: Submitting, *, waits: bool) -> list[Call]:
    applied = {APPLIED: "The wait that was honoured, in seconds"} if waits else {}
    answers = {
        200: Answer(
            "The event is decided: it was waited for, or repeated", Receipt, headers={**_ACCEPTED_HEADERS, **applied}
        ),
        202: Answer("The event is accepted durably", Receipt, headers={**_ACCEPTED_HEADERS, **applied}),
    }
    body: dict[str, Schema] = {JSON: Event, STRUCTURED: _CLOUDEVENT}
    parameters = (_KEY, *((_PREFER,) if waits else ()), *_TRACING)

    def single(path: str, operation: str, summary: str, endpoint: Any, kind: str | None) -> Call:
        return Call(
            "POST",
            path,
            operation,
            summary,
            endpoint,
            Permission.EVENTS_SUBMIT,
            answers,
            parameters,
            body,
            _SUBMISSION_PROBLEMS,
            "submissions",
            "At most 64 KiB. A CloudEvent in binary mode is a JSON body with `ce-` headers."
            + (f" The body may leave out its `kind`, which is {kind} here." if kind else ""),
        )

    return [
        single("/v1/risk", "postRisk", "Submit a risk event", submitting.post_risk, "risk"),
        single(
            "/v1/compliance", "postCompliance", "Submit a compliance event", submitting.post_compliance, "compliance"
        ),
        single("/v1/events", "postEvent", "Submit an event whose body names its kind", submitting.post_event, None),
        Call(
            "POST",
            "/v1/events/batch",
            "postBatch",
            "Submit up to 1,000 events",
            submitting.post_batch,
            Permission.EVENTS_SUBMIT,
            {200: Answer("One result per item, in order", BatchView)},
            (_BATCH_KEY, _KIND, _MAP, *_TRACING),
            {
                JSON: {
                    "type": "array",
                    "items": {"$ref": "#/components/schemas/Event"},
                    "minItems": 1,
                    "maxItems": 1000,
                },
                NDJSON: {"type": "string", "description": "One event per line"},
                CSV: {"type": "string", "description": "A header line, then one event per record (RFC 4180, UTF-8)"},
                BATCH: {"type": "array", "items": _CLOUDEVENT, "minItems": 1, "maxItems": 1000},
            },
            _SUBMISSION_PROBLEMS,
            "submissions",
            "At most 5 MiB. A bad item is refused alone; a batch whose items cannot be told apart is refused whole.",
        ),
    ]


def _simulation(submitting: Submitting) -> Call:
    return Call(
        "POST",
        "/v1/simulate",
        "postSimulation",
        "Decide one event without recording or sending anything",
        submitting.post_simulation,
        Permission.EVENTS_SIMULATE,
        {200: Answer("The decision that the event would get now", Decision)},
        _TRACING,
        {JSON: Event},
        _SUBMISSION_PROBLEMS,
        "submissions",
    )


def _labels(submitting: Submitting) -> Call:
    return Call(
        "POST",
        "/v1/labels",
        "postLabel",
        "Tell what became of an event in the world",
        submitting.post_label,
        Permission.LABELS_SUBMIT,
        {202: Answer("The label is accepted durably", LabelReceipt, headers={"Location": "The event it is about"})},
        _TRACING,
        {JSON: LabelBody},
        _SUBMISSION_PROBLEMS,
        "submissions",
        "A label may come before its event. Repeating one changes nothing; of two, the later `effective_at` holds.",
    )


def _reads(reading: Reading) -> list[Call]:
    found = {200: Answer("Where the event is, and its decision with its whole trail once there is one", EventView)}
    return [
        Call(
            "GET",
            "/v1/events",
            "findEvent",
            "Look up an event by the sender's own id",
            reading.find_event,
            Permission.EVENTS_READ,
            found,
            (Parameter("id", "query", "The submission's identity", {"type": "string", "minLength": 1}, required=True),),
            problems=(404, 422),
            tag="events",
        ),
        Call(
            "GET",
            "/v1/events/{event_id}",
            "getEvent",
            "Look up an event",
            reading.get_event,
            Permission.EVENTS_READ,
            found,
            (Parameter("event_id", "path", "As every answer to a submission names it", _EVENT_ID),),
            problems=(404,),
            tag="events",
        ),
        Call(
            "GET",
            "/v1/tenant",
            "getTenant",
            "The caller's own tenant",
            reading.get_tenant,
            Permission.TENANT_READ,
            {200: Answer("Limits, thresholds and partition", TenantView)},
            problems=(404,),
            tag="tenant",
        ),
    ]


def _feed(reading: Reading) -> Call:
    return Call(
        "GET",
        "/v1/decisions",
        "listDecisions",
        "Every decision, in an order in which nothing appears behind a cursor later",
        reading.list_decisions,
        Permission.DECISIONS_READ,
        {200: Answer("The decisions after a cursor; none when there are no newer ones", DecisionsView)},
        (
            Parameter("after", "query", "The cursor of the page before; left out: from the first decision"),
            Parameter(
                "limit",
                "query",
                "Decisions per page",
                {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": PAGE},
            ),
        ),
        problems=(422,),
        tag="events",
        about="Store the cursor with what you did about the page: reading on misses nothing and repeats nothing.",
    )


_REPORT: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"type": "string"}},
}
_VERDICT: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["status", "health", "reasons", "findings"],
    "properties": {
        "status": {"enum": ["ready", "not ready"]},
        "health": {"enum": [*map(str, Health)]},
        "reasons": {"type": "array", "items": {"type": "string"}},
        "findings": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["severity", "cause", "subject", "sentence"],
                "properties": {
                    "severity": {"type": "string"},
                    "cause": {"enum": [*map(str, Cause)]},
                    "subject": {"type": "string"},
                    "sentence": {"type": "string"},
                },
            },
        },
    },
}


def _health(health: HealthDoor) -> list[Call]:
    about: Mapping[str, tuple[str, str, dict[int, Answer]]] = {
        "/health": ("getHealth", "What this process is", {200: Answer("Status, environment, version", _REPORT)}),
        "/health/live": ("getLiveness", "Whether the process runs", {200: Answer("It does", _REPORT)}),
        "/health/ready": (
            "getReadiness",
            "Whether the process can do its work now",
            {200: Answer("It can", _VERDICT), 503: Answer("It cannot; `reasons` say why", _VERDICT)},
        ),
        "/metrics": (
            "getMetrics",
            "Prometheus metrics of this process",
            {200: Answer("Text exposition format", {"type": "string"}, "text/plain")},
        ),
    }
    return [
        Call("GET", route.path, *about[route.path][:2], route.endpoint, None, about[route.path][2], tag="health")
        for route in health_routes(health)
        if isinstance(route, Route)
    ]
