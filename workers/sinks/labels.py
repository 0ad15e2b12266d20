"""The labels sink: late ground truth from the queue into the table `labels`, each label once.

Promises that a delivery is acked only after its label is committed, and that one label that PostgreSQL refuses, or
that cannot be read, is parked alone. Does not ask whether the event exists: a label may precede it. Features learn of
a label after its row is there and before its ack, also of one that was there already: they may have missed it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import structlog

from contracts.failures import InfrastructureError, UndecodableEntryError, classify
from contracts.labels import Label
from contracts.messages import label_from, label_message
from contracts.ports import Clock, Delivery, LabelBook, Publisher, Telemetry
from contracts.settlement import Ack, Pause, Settlement, replays_of
from contracts.telemetry import LABELS, PARKED, Measurement
from workers.settling import Park, park_bytes
from workers.sinks.bisecting import publish_parks, write_or_park

log = structlog.get_logger("labels")

_STAGE = "labels"

Feed = Callable[[Sequence[Label]], Awaitable[None]]


async def _nobody(_: Sequence[Label]) -> None:
    return None


class LabelsSink:
    """Records what gathered in one call."""

    def __init__(
        self, label_book: LabelBook, publisher: Publisher, telemetry: Telemetry, clock: Clock, feed: Feed = _nobody
    ) -> None:
        """`publisher` is for parking what cannot be recorded; `feed` takes what was, and may be given it again."""
        self._feed = feed
        self._label_book = label_book
        self._publisher = publisher
        self._telemetry = telemetry
        self._clock = clock

    async def handle(self, deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        """Record the labels of all deliveries; answers Pause for all while a server does not answer."""
        labels: list[tuple[Label, int]] = []
        parks: list[Park] = []
        for delivery in deliveries:
            try:
                labels.append((label_from(delivery.body), replays_of(delivery.headers)))
            except UndecodableEntryError as error:
                parks.append(self._park(delivery.body, error, replays_of(delivery.headers)))
        try:
            fresh, refused = await write_or_park(labels, self._record, self._refuse)
            await publish_parks(self._publisher, [*parks, *refused], _STAGE)
        except InfrastructureError as error:
            return [Pause(type(error).__name__)] * len(deliveries)
        stored = sum(fresh)
        self._telemetry.record(
            Measurement(LABELS, stored, {"door": "sink", "result": "stored"}),
            Measurement(LABELS, len(fresh) - stored, {"door": "sink", "result": "present"}),
        )
        return [Ack()] * len(deliveries)

    async def _record(self, rows: Sequence[tuple[Label, int]]) -> Sequence[bool]:
        labels = [label for label, _ in rows]
        fresh = await self._label_book.record(labels)
        await self._feed(labels)
        return fresh

    def _refuse(self, row: tuple[Label, int], error: Exception) -> Park:
        label, replays = row
        return self._park(label_message(label).body, error, replays, label)

    def _park(self, body: bytes, error: Exception, replays: int, label: Label | None = None) -> Park:
        """The letter holds the message's own bytes, so that a replay is the same label."""
        log.error(
            "label.refused",
            exception_class=type(error).__name__,
            event_id=label.event_id if label is not None else None,
        )
        category = str(classify(error).category)
        self._telemetry.record(Measurement(PARKED, 1, {"stage": _STAGE, "category": category}))
        whose = (label.scope, label.event_id) if label is not None else None
        return park_bytes(body, _STAGE, error, self._clock.now().isoformat(), whose, replays=replays)
