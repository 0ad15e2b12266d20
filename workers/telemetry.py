"""Measurements on their way to the metrics sink: gathered, sent once a second, never waited for.

Promises bounded memory and that no entry is ever held up; promises nothing about delivery.
"""

from __future__ import annotations

import asyncio
import contextlib

import orjson

from contracts.ports import Ids, Message, Publisher
from contracts.telemetry import Measurement, MetricType
from contracts.topology import METRICS_QUEUE, WORK

_MOST_VALUES = 5_000


class QueueTelemetry:
    """Telemetry over the metrics queue. Counters are summed; histogram values are kept up to a bound."""

    def __init__(self, publisher: Publisher, ids: Ids, interval_s: float = 1.0) -> None:
        """`interval_s`: seconds between two messages."""
        self._publisher = publisher
        self._ids = ids
        self._interval_s = interval_s
        self._rows: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}
        self._task: asyncio.Task[None] | None = None

    def record(self, *measurements: Measurement) -> None:
        """Queue measurements; beyond the bound histogram values are dropped."""
        for m in measurements:
            values = self._rows.setdefault((m.metric.name, tuple(sorted(m.labels.items()))), [])
            if m.metric.type is MetricType.COUNTER:
                values[:] = [sum(values) + m.value]
            elif len(values) < _MOST_VALUES:
                values.append(round(m.value, 6))

    async def start(self) -> None:
        """Begin to send."""
        self._task = asyncio.create_task(self._send_forever(), name="telemetry")

    async def _send_forever(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self.flush()

    async def flush(self) -> None:
        """Send what is queued, once; losing it is allowed."""
        rows, self._rows = self._rows, {}
        if rows:
            body = orjson.dumps([(name, values, dict(labels)) for (name, labels), values in rows.items()])
            await self._publisher.publish([self._message(body)])

    def _message(self, body: bytes) -> Message:
        return Message(
            exchange=WORK,
            routing_key=METRICS_QUEUE,
            body=body,
            message_id=self._ids.token(),
            persistent=False,
            mandatory=False,
            confirm=False,
            content_type="application/json",
        )

    async def stop(self) -> None:
        """Send the rest and end."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.flush()
