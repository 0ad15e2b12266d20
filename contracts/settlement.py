"""How a delivery ends, and what a dead letter carries on its way to the table `dead_letters`.

A settlement is a value; the consumer's adapter carries it out. Retries and parks are publishes that
are confirmed *before* the Ack, so they need no settlement of their own. Nothing here publishes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from contracts.codec import Entry, decode_carrier, encode_carrier
from contracts.events import canonical_json
from contracts.failures import Category, InvalidTenantError, UndecodableEntryError
from contracts.ports import DeadLetter
from contracts.tenancy import TenantScope
from contracts.topology import INGEST

FAILURE_HEADER = "x-riskfleet-failure"
REPLAYS_HEADER = "x-riskfleet-replays"
"""How often an operator sent this message again, for bodies that have no header of their own to say it."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Everything that the delivery owed is confirmed: take it off the queue."""


@dataclass(frozen=True, slots=True)
class Pause:
    """A server does not answer: nothing is acked, the consumer waits and tries the same delivery again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    """This delivery alone has to wait: it stays unacked, and the handler is given it again after so many seconds."""

    reason: str
    seconds: float


Settlement = Ack | Pause | Hold


def failure_headers(letter: DeadLetter) -> dict[str, Any]:
    """The headers of a parked message: all of the letter except its body."""
    fields = {name: value for name, value in asdict(letter).items() if name not in ("scope", "body")}
    fields["tenant"] = letter.scope.tenant_id if letter.scope else None
    if not letter.replays:  # a sink of the release before does not know the field
        del fields["replays"]
    return {FAILURE_HEADER: canonical_json(fields).decode()}


def letter_from(headers: Mapping[str, Any], body: bytes) -> DeadLetter:
    """The letter that a parked message carries; the inverse of `failure_headers`.

    Raises UndecodableEntryError when the header is absent, broken or a sender's own: the broker moved the message by
    itself (delivery limit), and `undelivered_letters` reads it.
    """
    if _from_sender(headers):
        raise UndecodableEntryError("the headers of a submission say nothing about its failure")
    raw = headers.get(FAILURE_HEADER)
    if not isinstance(raw, str | bytes | bytearray):
        raise UndecodableEntryError(f"a parked message has no {FAILURE_HEADER} header")
    try:
        fields = dict(orjson.loads(raw))
        tenant = fields.pop("tenant")
        return DeadLetter(scope=None if tenant is None else TenantScope(tenant), body=body, **fields)
    except (KeyError, TypeError, ValueError, InvalidTenantError) as error:
        raise UndecodableEntryError(f"the {FAILURE_HEADER} header cannot be read") from error


def replays_of(headers: Mapping[str, Any]) -> int:
    """How often a message was replayed, as its header says; 0 without a header that can be read."""
    value = headers.get(REPLAYS_HEADER)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else 0


def undelivered_letters(headers: Mapping[str, Any], body: bytes, at: str) -> tuple[DeadLetter, ...]:
    """The letters of a message that the broker parked by itself because it was delivered too often.

    One letter per entry; what cannot be decoded is one letter without a tenant, and so is a submission, whose body
    its sender wrote. `at` is the time (RFC 3339) at which the sink met it. Ids are hashes of the bytes, so a repeat is
    the same letter.
    """
    if _from_sender(headers):
        return (_undelivered(None, "ingress", body, at),)
    queue = headers.get("x-first-death-queue")
    stage = queue.split(".")[2] if isinstance(queue, str) and queue.count(".") >= 2 else "unknown"
    try:
        entries = decode_carrier(body)
    except UndecodableEntryError:
        return (_undelivered(None, stage, body, at),)
    bad = any(isinstance(entry, UndecodableEntryError) for entry in entries)
    whole = (_undelivered(None, stage, body, at),) if bad else ()
    return (*whole, *(_undelivered(entry, stage, body, at) for entry in entries if isinstance(entry, Entry)))


def _from_sender(headers: Mapping[str, Any]) -> bool:
    """Whether the broker parked it from an ingest queue: all of it but the broker's own headers is a sender's."""
    queue = headers.get("x-first-death-queue")
    return isinstance(queue, str) and queue.startswith(f"{INGEST}.")


def _undelivered(entry: Entry | None, stage: str, body: bytes, at: str) -> DeadLetter:
    scope: TenantScope | None = None
    if entry is not None:
        body = encode_carrier((entry,))
        try:
            scope = entry.header.scope
        except (InvalidTenantError, TypeError):  # a header is JSON: its tenant may be anything
            scope = None
    digest = hashlib.sha256(body).hexdigest()
    return DeadLetter(
        letter_id=f"undelivered:{stage}:{digest[:32]}",
        scope=scope,
        event_id=entry.header.event if entry and scope else "",
        stage=entry.header.stage if entry and scope else stage,
        category=Category.WORKFLOW_ERROR,
        problem="delivery-limit",
        exception_class="",
        fingerprint=hashlib.sha256(f"delivery-limit|{stage}".encode()).hexdigest()[:16],
        attempts=entry.header.attempts if entry and scope else 0,
        first_failed_at=at,
        last_failed_at=at,
        body=body,
        replays=entry.header.replays if entry and scope else 0,
    )
