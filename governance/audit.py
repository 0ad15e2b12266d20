"""The audit's hash chain as pure functions: how a record is linked, and how a chain and a trail are checked.

A chain is one tenant's records in the order of arrival. hash(seq) = SHA-256(hash(seq − 1) ‖ seq as 8 bytes big
endian ‖ SHA-256(body)); before the first record stands SHA-256("riskfleet.audit" NUL chain). Promises: a changed,
removed, inserted or reordered record, and a tail cut behind the head's back, is a problem with a place. Does not
promise to notice a chain that somebody with the owner's rights rebuilt as a whole, head included: checkpoints
outside the database are for that.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import orjson

from contracts.events import canonical_json
from contracts.identity import Principal
from contracts.state import AuditRecord, EventState
from contracts.tenancy import TenantScope

SYSTEM_CHAIN: Final = "_system"
"""The chain of records that belong to no tenant; no tenant id begins with an underscore."""

_SEQ: Final = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What `verify` found in one chain.

    `missing` records are owed by a decision's trail and not in the chain; `orphans` are in the chain for a decided
    event and in none of its trails. `intact`: the chain holds and nothing is missing; else `problem` says the first.
    """

    tenant: str
    records: int
    decisions: int
    missing: int
    orphans: int
    intact: bool
    problem: str | None


def chain_of(scope: TenantScope | None) -> str:
    """The name of the chain that a scope's records go to."""
    return SYSTEM_CHAIN if scope is None else scope.tenant_id


def genesis(chain: str) -> bytes:
    """The hash before a chain's first record."""
    return hashlib.sha256(b"riskfleet.audit\0" + chain.encode()).digest()


def link(previous: bytes, seq: int, body: bytes) -> bytes:
    """The hash of record number `seq` (from 1)."""
    return hashlib.sha256(previous + _SEQ.pack(seq) + hashlib.sha256(body).digest()).digest()


@dataclass(frozen=True, slots=True)
class ChainRow:
    """One stored record, as far as the chain is concerned."""

    seq: int
    record_id: str
    event_id: str
    body: bytes
    prev_hash: bytes
    hash: bytes


@dataclass(frozen=True, slots=True)
class ChainHead:
    """Where a chain ends: the last sequence number (0: empty) and its hash."""

    seq: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class ChainReport:
    """How far a chain holds: its last good record, how many were read in all, and the first problem, if any."""

    records: int
    head: ChainHead
    problem: str | None = None


def start_of(chain: str) -> ChainReport:
    """The report of an empty chain, to go on from."""
    return ChainReport(0, ChainHead(0, genesis(chain)))


def verify_chain(rows: Iterable[ChainRow], start: ChainReport) -> ChainReport:
    """Go on from `start` through rows in order of `seq`; stops at the first problem. Needs no memory for the rows."""
    records, head = start.records, start.head
    if start.problem is not None:
        return start
    for row in rows:
        problem = _problem(row, head)
        if problem is not None:
            return ChainReport(records, head, problem)
        records, head = records + 1, ChainHead(row.seq, row.hash)
    return ChainReport(records, head)


def check_head(report: ChainReport, head: ChainHead) -> ChainReport:
    """Compare the end of a verified chain with the stored head: a removed tail shows only here."""
    if report.problem is not None or report.head == head:
        return report
    if report.head.seq < head.seq:
        problem = f"the head says {head.seq} records, the last one found is {report.head.seq}: the tail is missing"
    elif report.head.seq > head.seq:
        problem = f"the head says {head.seq} records, but record {report.head.seq} exists"
    else:
        problem = f"the hash of record {head.seq} is not the head's"
    return ChainReport(report.records, report.head, problem)


def _problem(row: ChainRow, head: ChainHead) -> str | None:
    expected = head.seq + 1
    if row.seq != expected:
        return f"record {expected} is missing; the next one found is {row.seq}"
    if row.prev_hash != head.hash:
        return f"record {row.seq} does not stand on record {head.seq}"
    if link(head.hash, row.seq, row.body) != row.hash:
        return f"record {row.seq} was changed: its hash does not fit its body"
    if not _named_by_body(row):
        return f"record {row.seq} is filed under another id than its body names"
    return None


def _named_by_body(row: ChainRow) -> bool:
    """The columns beside the body are outside the hash; where the body repeats them they must agree."""
    try:
        body = orjson.loads(row.body)
    except ValueError:
        return True
    if not isinstance(body, Mapping):
        return True
    record_id, event_id = body.get("record_id", row.record_id), body.get("event_id", row.event_id)
    return bool(record_id == row.record_id and (event_id or "") == row.event_id)


@dataclass(frozen=True, slots=True)
class TrailGaps:
    """Record ids that a decision's trail owes the chain, and ids in the chain that no trail of the event knows.

    An orphan is a recomputed sibling after lost Redis writes: visible, and no fault by itself.
    """

    missing: tuple[str, ...]
    orphans: tuple[str, ...]


def trail_gaps(decided: Iterable[EventState], found: Mapping[str, bytes]) -> TrailGaps:
    """Compare the trails of decided states with `found`: record id → body of every chain record of their events.

    A record whose body is not byte for byte what the trail says counts as missing. An orphan is the record of a version
    that no decision stands on; what people did to an event, and that it was parked, are records of their own.
    """
    owed = {record.record_id: record.body for state in decided for record in state.records()}
    missing = sorted(record_id for record_id, body in owed.items() if found.get(record_id) != body)
    others = sorted(found.keys() - owed.keys())
    return TrailGaps(tuple(missing), tuple(record_id for record_id in others if _of_a_version(found[record_id])))


def _of_a_version(body: bytes) -> bool:
    try:
        return "entry" in orjson.loads(body)
    except (orjson.JSONDecodeError, TypeError):
        return True


def operator_record(
    scope: TenantScope | None,
    action: str,
    caller: Principal,
    at: str,
    subject: Mapping[str, str | int],
    detail: Mapping[str, str | int],
    *,
    event_id: str = "",
) -> AuditRecord:
    """The record of one command of a person or program: `action` such as "registry.approved", `at` RFC 3339 in UTC.

    `subject` names what was acted on, `detail` says how; neither holds payload, secrets or floats. A scope of None is
    the system chain, where what holds for every tenant is recorded. The id is a hash over all of it, so two commands
    that differ in anything, the time included, are two records.
    """
    content = {
        "v": 1,
        "action": action,
        "actor": caller.actor,
        "person": caller.person,
        "tenant": chain_of(scope),
        "event_id": event_id,
        "at": at,
        "subject": dict(subject),
        "detail": dict(detail),
    }
    record_id = hashlib.sha256(b"riskfleet.operator\0" + canonical_json(content)).hexdigest()[:32]
    return AuditRecord(scope, record_id, event_id, 0, "", canonical_json(content | {"record_id": record_id}))
