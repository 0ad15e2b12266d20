"""Reading back: what became of an event, every decision in order, and the tenant itself.

Promises: a caller sees its own tenant only, since every key is made from the credential's scope; another tenant's event
looks like one that nobody knows. Reads the decision's row first and the state store only for what is still under way.
Changes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from contracts.codec import state_from_bytes
from contracts.events import MAX_BODY_BYTES, event_id_of
from contracts.failures import InvalidMetadataError, NotKnownError
from contracts.identity import Permission
from contracts.lifecycle import FINAL_VERSION, Status
from contracts.outcomes import STATUS_OF, Decision, Outcome
from contracts.ports import Credentials, DecisionFeed, DecisionRow, Directory, Ledger, Peek, StateStore
from contracts.state import Pins, Thresholds, TrailEntry
from contracts.tenancy import TenantScope
from contracts.topology import STAGES, RunningLayouts, Stage
from gateway.batch import MAX_BATCH_BYTES, MAX_ITEMS
from gateway.intake import MAX_IDENTITY
from gateway.waiting import MAX_WAIT
from gateway.web import json_answer, tenant_of

MAX_PAGE: Final = 1_000
PAGE: Final = 100
MAX_CURSOR: Final = 256
_EVENT_ID: Final = re.compile(r"[0-9a-f]{32}")

_ANSWER = ConfigDict(frozen=True, extra="forbid")


class EventView(BaseModel):
    """Where an event is. `holder` names the process that works on it now; only `status` onwards is always known."""

    model_config = _ANSWER
    event_id: str
    status: Status
    version: int
    stage: Stage | None
    holder: str | None = None
    id: str | None = None
    kind: Literal["risk", "compliance"] | None = None
    received_at: str | None = None
    correlation_id: str | None = None
    pins: Pins | None = None
    revision: int | None = None
    decision: Decision | None = None
    trail: tuple[TrailEntry, ...] | None = None


class DecisionsView(BaseModel):
    """One page of the feed. Keep `cursor`: it is where the next call goes on; `more`: call again at once."""

    model_config = _ANSWER
    decisions: tuple[Decision, ...]
    cursor: str | None
    more: bool


class LimitsView(BaseModel):
    """What one request may hold (bytes, events, seconds), and what the tenant may hand in (null: no limit).

    `undecided_events` may be under way at once; `burst` new events may come at once, then `rate_per_s` per second.
    """

    model_config = _ANSWER
    max_body_bytes: int
    max_batch_bytes: int
    max_batch_events: int
    max_wait_seconds: int
    undecided_events: int | None
    rate_per_s: float | None
    burst: int | None


class TenantView(BaseModel):
    """The caller's tenant. `ingest_queue` is null for a tenant without a broker user."""

    model_config = _ANSWER
    tenant_id: str
    name: str
    partition: int
    partitions: int
    limits: LimitsView
    thresholds: Thresholds
    ingest_queue: str | None


@dataclass(frozen=True, slots=True)
class ReadingPorts:
    """What is read from; `feed` None: this process does not offer the feed."""

    credentials: Credentials
    directory: Directory
    ledger: Ledger
    state_store: StateStore
    feed: DecisionFeed | None


class Reading:
    """The endpoints that read."""

    def __init__(self, ports: ReadingPorts, layouts: RunningLayouts) -> None:
        self._ports = ports
        self._layouts = layouts

    async def find_event(self, request: Request) -> Response:
        """GET /v1/events?id= (the sender's own id)."""
        scope = await tenant_of(request, self._ports.credentials, Permission.EVENTS_READ)
        name = one_query(request, "id")
        if name is None or not 1 <= len(name) <= MAX_IDENTITY:
            raise InvalidMetadataError(f"name one event: ?id= and 1 to {MAX_IDENTITY} characters")
        return await self._event(scope, event_id_of(scope, name))

    async def get_event(self, request: Request) -> Response:
        """GET /v1/events/{event_id}."""
        scope = await tenant_of(request, self._ports.credentials, Permission.EVENTS_READ)
        event_id = request.path_params["event_id"]
        if not _EVENT_ID.fullmatch(event_id):
            raise NotKnownError
        return await self._event(scope, event_id)

    async def list_decisions(self, request: Request) -> Response:
        """GET /v1/decisions?after=&limit=."""
        scope = await tenant_of(request, self._ports.credentials, Permission.DECISIONS_READ)
        after = one_query(request, "after")
        if after is not None and not 1 <= len(after) <= MAX_CURSOR:
            raise InvalidMetadataError(
                "after is not a cursor of this feed; leave it out to begin at the first decision"
            )
        limit = _limit(one_query(request, "limit"))
        assert self._ports.feed is not None  # else the call is not routed
        page = await self._ports.feed.page(scope, after, limit)
        return json_answer(
            200,
            {
                "decisions": [orjson.Fragment(decision) for decision in page.decisions],
                "cursor": page.cursor or after,
                "more": len(page.decisions) == limit,
            },
        )

    async def get_tenant(self, request: Request) -> Response:
        """GET /v1/tenant."""
        scope = await tenant_of(request, self._ports.credentials, Permission.TENANT_READ)
        profile = next((p for p in await self._ports.directory.tenants() if p.scope == scope), None)
        if profile is None:
            raise NotKnownError("the tenant was only just made or is being removed; repeat in a few seconds")
        layout = self._layouts.newest
        view = TenantView(
            tenant_id=scope.tenant_id,
            name=profile.name,
            partition=layout.partition(scope),
            partitions=layout.partitions,
            limits=LimitsView(
                max_body_bytes=MAX_BODY_BYTES,
                max_batch_bytes=MAX_BATCH_BYTES,
                max_batch_events=MAX_ITEMS,
                max_wait_seconds=MAX_WAIT,
                **profile.limits.model_dump(),
            ),
            thresholds=profile.thresholds,
            ingest_queue=scope.ingest_queue if profile.broker_user else None,
        )
        return json_answer(200, view.model_dump(mode="json"))

    async def _event(self, scope: TenantScope, event_id: str) -> Response:
        key = ((scope, event_id),)
        (row,) = await self._ports.ledger.decisions(key)
        if row is not None:
            return json_answer(200, _decided(event_id, row))
        (failed,) = await self._ports.ledger.failed(key)
        (peek,) = await self._ports.state_store.peek(key)
        if failed:
            return json_answer(200, _failed(event_id, peek))
        if peek is None:
            (known,) = await self._ports.ledger.known(key)
            if not known:
                raise NotKnownError
            return json_answer(200, {"event_id": event_id, "status": Status.RECEIVED, "version": 0, "stage": STAGES[0]})
        if peek.version >= FINAL_VERSION:
            (row,) = await self._ports.ledger.decisions(key)  # it was decided between our two questions
        return json_answer(200, _decided(event_id, row) if row is not None else _under_way(event_id, peek))


def one_query(request: Request, name: str) -> str | None:
    """A query parameter's value. Raises InvalidMetadataError when it is sent more than once."""
    values = request.query_params.getlist(name)
    if len(values) > 1:
        raise InvalidMetadataError(f"the query names {name} more than once")
    return values[0] if values else None


def _limit(text: str | None) -> int:
    if text is None:
        return PAGE
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MAX_PAGE:
        raise InvalidMetadataError(f"limit is a number from 1 to {MAX_PAGE:,}")
    return int(text)


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


def _failed(event_id: str, peek: Peek | None) -> dict[str, Any]:
    """Nobody goes on with it: what the state store remembers of it is how far it came."""
    known = {} if peek is None or peek.version >= FINAL_VERSION else _under_way(event_id, peek)
    known |= {"event_id": event_id, "status": Status.FAILED, "version": FINAL_VERSION, "stage": None}
    return {name: value for name, value in known.items() if name != "holder"}


def _under_way(event_id: str, peek: Peek) -> dict[str, Any]:
    document: dict[str, Any] = {
        "event_id": event_id,
        # Final without a decision: the only other end is a dead letter that somebody discarded.
        "status": peek.status or Status.FAILED,
        "version": peek.version,
        "stage": STAGES[peek.version] if peek.version < FINAL_VERSION else None,
    }
    if peek.holder:
        document["holder"] = peek.holder
    if peek.stored is None:
        return document
    state = state_from_bytes(peek.stored)
    return document | {
        "id": state.event.id,
        "kind": state.KIND,
        "status": state.status,
        "received_at": state.received_at,
        "correlation_id": state.correlation_id,
        "pins": state.created.pins.model_dump(mode="json") if state.created else None,
        "trail": [entry.model_dump(mode="json") for entry in state.trail],
    }
