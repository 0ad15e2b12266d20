"""The audit sink: records from the queues into the per-tenant chain, each exactly once.

Promises that a delivery is acked only after its records are committed, and that one record that
PostgreSQL refuses is parked alone. Does not order records: the sequence is the order of arrival.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from contracts.codec import Entry, decode_carrier, encode_carrier, record_of_entry
from contracts.failures import InfrastructureError, RiskfleetError, UndecodableEntryError
from contracts.messages import probe_of
from contracts.ports import AuditLog, Clock, Delivery, Publisher, Telemetry
from contracts.settlement import Ack, Pause, Settlement
from contracts.telemetry import AUDIT_RECORDS, PARKED, Measurement
from contracts.topology import partition_of
from workers.settling import Park, park, park_bytes
from workers.sinks.bisecting import publish_parks, write_or_park

log = structlog.get_logger("audit")

_STAGE = "audit"


class AuditSink:
    """Appends what gathered as one transaction."""

    def __init__(self, audit_log: AuditLog, publisher: Publisher, telemetry: Telemetry, clock: Clock) -> None:
        """`publisher` is for parking what cannot be appended."""
        self._audit_log = audit_log
        self._publisher = publisher
        self._telemetry = telemetry
        self._clock = clock

    async def handle(self, deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        """Append the records of all deliveries; answers Pause for all while PostgreSQL does not answer."""
        entries: list[Entry] = []
        parks: list[Park] = []
        probes: dict[int, str] = {}
        for delivery in deliveries:
            if (sent_at := probe_of(delivery)) is not None:
                probes[partition_of(delivery.queue)] = sent_at
            else:
                self._read(delivery, entries, parks)
        try:
            fresh, refused = await write_or_park(entries, self._append, self._refuse)
            await publish_parks(self._publisher, [*parks, *refused], _STAGE)
            for partition, sent_at in probes.items():
                await self._audit_log.probed(partition, sent_at)
        except InfrastructureError as error:
            return [Pause(type(error).__name__)] * len(deliveries)
        appended = sum(fresh)
        self._telemetry.record(
            Measurement(AUDIT_RECORDS, appended, {"result": "appended"}),
            Measurement(AUDIT_RECORDS, len(fresh) - appended, {"result": "present"}),
        )
        return [Ack()] * len(deliveries)

    async def _append(self, entries: Sequence[Entry]) -> Sequence[bool]:
        return await self._audit_log.append([record_of_entry(entry) for entry in entries])

    def _read(self, delivery: Delivery, entries: list[Entry], parks: list[Park]) -> None:
        now = self._clock.now().isoformat()
        try:
            items = decode_carrier(delivery.body)
        except UndecodableEntryError as error:
            parks.append(park_bytes(delivery.body, _STAGE, error, now))
            return
        for item in items:
            try:
                if isinstance(item, UndecodableEntryError):
                    raise item
                record_of_entry(item)  # what has no chain is parked now, alone
                entries.append(item)
            except RiskfleetError as error:
                body = encode_carrier((item,)) if isinstance(item, Entry) else delivery.body
                parks.append(park_bytes(body, _STAGE, error, now))

    def _refuse(self, entry: Entry, error: Exception) -> Park:
        log.error("audit.refused", exception_class=type(error).__name__, event_id=entry.header.event)
        self._telemetry.record(Measurement(PARKED, 1, {"stage": _STAGE, "category": "UNEXPECTED_ERROR"}))
        now = self._clock.now().isoformat()
        if not entry.header.tenant:  # the system's: no tenant's letter
            return park_bytes(encode_carrier((entry,)), _STAGE, error, now, replays=entry.header.replays)
        return park(entry, error, now)
