"""Bytes on the wire: carriers of entries, and stored states with their upcasters.

A *carrier* is one AMQP message: a length-prefixed list of entries. An *entry* is a small JSON header
that is parsed alone, and stored bytes that a stage may decode later or never. A digest is over
stored bytes, never over an upcast.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import orjson
from pydantic import ValidationError

from contracts.events import Event, canonical_json
from contracts.failures import UndecodableEntryError
from contracts.lifecycle import Status
from contracts.state import SECTIONS, STATE_SCHEMA, STATE_TYPES, AuditRecord, EventState
from contracts.tenancy import TenantScope
from contracts.topology import VERSION

MAGIC = b"RFC1"
MAX_ENTRIES = 64
MAX_CARRIER_BYTES = 262_144
CARRIER_HEADER = "x-riskfleet-events"

_U16, _U32 = struct.Struct(">H"), struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class EntryHeader:
    """What a stage must know of an entry before it looks at its bytes.

    `attempts` counts the entry's own failures at this stage; `first_failed_at` is the time (RFC 3339)
    of the first of them; `suspect` says that a process died while it held the entry. `received_ms`: when a door
    accepted the event (ms since 1970), 0 when an earlier release made the entry. `replays` counts how often an
    operator sent it again from a dead letter.
    """

    tenant: str
    event: str
    kind: str
    stage: str
    n: int
    digest: str
    body_digest: str
    topology: str = VERSION
    attempts: int = 0
    first_failed_at: str | None = None
    suspect: bool = False
    reply_to: str | None = None
    received_ms: int = 0
    replays: int = 0

    @property
    def scope(self) -> TenantScope:
        """The tenant; raises InvalidTenantError when it is not well-formed."""
        return TenantScope(self.tenant)


@dataclass(frozen=True, slots=True)
class Entry:
    """A header and the stored bytes of one version (or of one audit record)."""

    header: EntryHeader
    body: bytes

    @property
    def message_id(self) -> str:
        """Unique per version, stage, attempt and replay, so that two publishes in flight never share an id."""
        h = self.header
        again = f"r{h.replays}" if h.replays else ""
        return f"{h.event}:{h.n}:{h.digest[:16]}:{h.stage}:{h.attempts}{'s' if h.suspect else ''}{again}"

    def evolve(self, **changes: Any) -> Entry:
        """The same stored bytes under a changed header."""
        return Entry(replace(self.header, **changes), self.body)


_FIELDS: dict[str, tuple[type, ...]] = {
    name: (int,) if name in ("n", "attempts", "received_ms", "replays") else (bool,) if name == "suspect" else (str,)
    for name in EntryHeader.__dataclass_fields__
} | {"first_failed_at": (str, type(None)), "reply_to": (str, type(None))}


def entry_of(state: EventState, stage: str, reply_to: str | None = None, *, topology: str = VERSION) -> Entry:
    """The entry that carries `state` to `stage` on the queues of a topology version."""
    header = EntryHeader(
        tenant=state.scope.tenant_id,
        event=state.event_id,
        kind=state.KIND,
        stage=stage,
        n=state.n,
        digest=state.digest,
        body_digest=state.body_digest,
        topology=topology,
        reply_to=reply_to,
        received_ms=_milliseconds(state.received_at),
    )
    return Entry(header, state.to_bytes())


def _milliseconds(moment: str) -> int:
    try:
        return round(datetime.fromisoformat(moment).timestamp() * 1000)
    except ValueError:  # its age is then counted from when the state store met it
        return 0


def entry_of_record(record: AuditRecord) -> Entry:
    """The entry that carries an audit record to the audit sink; `digest` of its header is the record id."""
    tenant = record.scope.tenant_id if record.scope else ""
    header = EntryHeader(tenant, record.event_id, "audit", "audit", record.n, record.record_id, record.digest)
    return Entry(header, record.body)


def record_of_entry(entry: Entry) -> AuditRecord:
    """The audit record that an entry carries; the inverse of `entry_of_record`."""
    h = entry.header
    scope = TenantScope(h.tenant) if h.tenant else None
    return AuditRecord(scope, h.digest, h.event, h.n, h.body_digest, entry.body)


def encode_carrier(entries: Sequence[Entry]) -> bytes:
    """The bytes of one AMQP message that holds 1–64 entries. Raises ValueError for another number."""
    if not 1 <= len(entries) <= MAX_ENTRIES:
        raise ValueError(f"a carrier holds 1 to {MAX_ENTRIES} entries, not {len(entries)}")
    parts = [MAGIC, _U16.pack(len(entries))]
    for entry in entries:
        header = canonical_json({name: getattr(entry.header, name) for name in _FIELDS})
        parts += (_U32.pack(len(header)), header, _U32.pack(len(entry.body)), entry.body)
    return b"".join(parts)


def decode_carrier(data: bytes) -> tuple[Entry | UndecodableEntryError, ...]:
    """The entries of a carrier; a bad entry is returned as an error in its place, alone.

    Raises UndecodableEntryError when the carrier itself cannot be read.
    """
    if data[:4] != MAGIC:
        raise UndecodableEntryError("the message is not a carrier: its first bytes are not RFC1")
    try:
        (count,) = _U16.unpack_from(data, 4)
        offset, raw = 6, []
        for _ in range(count):
            header, offset = _take(data, offset)
            body, offset = _take(data, offset)
            raw.append((header, body))
    except (struct.error, IndexError):
        raise UndecodableEntryError("the carrier ends in the middle of an entry") from None
    if offset != len(data) or not 1 <= count <= MAX_ENTRIES:
        raise UndecodableEntryError("the carrier's length does not fit its entries")
    return tuple(_entry(header, body) for header, body in raw)


def _take(data: bytes, offset: int) -> tuple[bytes, int]:
    (size,) = _U32.unpack_from(data, offset)
    end = offset + 4 + size
    if end > len(data):
        raise IndexError
    return data[offset + 4 : end], end


def _entry(header: bytes, body: bytes) -> Entry | UndecodableEntryError:
    try:
        fields = orjson.loads(header)
        known = {name: fields[name] for name in _FIELDS if name in fields}
        if any(not isinstance(value, _FIELDS[name]) for name, value in known.items()):
            raise TypeError
        return Entry(EntryHeader(**known), body)
    except (TypeError, KeyError, ValueError):
        return UndecodableEntryError("an entry's header cannot be read")


Upcaster = Callable[[dict[str, Any]], dict[str, Any]]
UPCASTERS: dict[int, Upcaster] = {}
"""From schema N to N+1. A release reads N−1 and N; the table is empty while there is only schema 1."""


def upcast(document: dict[str, Any], upcasters: dict[int, Upcaster] | None = None) -> dict[str, Any]:
    """Bring a stored state to the current schema, one step at a time.

    Raises UndecodableEntryError for a schema that no upcaster leads from, or that is newer than ours.
    """
    table = UPCASTERS if upcasters is None else upcasters
    target = max((STATE_SCHEMA, *(schema + 1 for schema in table)))
    while document.get("schema") != target:
        step = table.get(document.get("schema", -1))
        if step is None:
            raise UndecodableEntryError(f"state schema {document.get('schema')!r} is not readable by this release")
        document = step(document)
    return document


def _steps(trail: Any) -> tuple[dict[str, Any], ...]:
    """A stored trail, seen to hold what `records` needs of each step; the rest is checked by whoever looks into it."""
    for step in trail:
        texts = (step["digest"], step["step"], step["parent"] or "")
        if type(step["n"]) is not int or not all(type(text) is str for text in texts):
            raise TypeError
    return tuple(trail)


def state_from_bytes(data: bytes) -> EventState:
    """Decode stored bytes. Raises UndecodableEntryError when they are not a state of a known schema."""
    try:
        document = orjson.loads(data)
        if not isinstance(document, dict):
            raise UndecodableEntryError("a stored state is a JSON object")
        stored_schema = document.get("schema")
        d = upcast(document)
        sections: dict[str, Any] = {name: kind.model_validate(d[name]) for name, kind in SECTIONS.items() if name in d}
        state = STATE_TYPES[d["kind"]](
            scope=TenantScope(d["tenant"]),
            event_id=d["event_id"],
            event=Event.model_validate(d["event"]),
            body_digest=d["body_digest"],
            received_at=d["received_at"],
            source=d["source"],
            correlation_id=d["correlation_id"],
            traceparent=d["traceparent"],
            n=d["n"],
            status=Status(d["status"]),
            digest=d["digest"],
            steps=_steps(d["trail"]),
            **sections,
        )
        if d["schema"] == stored_schema:  # an upcast is never what was stored
            state.plain.update({name: d[name] for name in ("event", *sections)}, bytes=data)
        return state
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise UndecodableEntryError(f"a stored state cannot be read ({type(error).__name__})") from error


def carriers(entries: Iterable[Entry], limit: int = MAX_ENTRIES) -> list[list[Entry]]:
    """Group entries into carriers of at most `limit` entries and 256 KiB, in order."""
    groups: list[list[Entry]] = []
    size = 0
    for entry in entries:
        cost = len(entry.body) + 512
        if not groups or len(groups[-1]) >= limit or size + cost > MAX_CARRIER_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += cost
    return groups
