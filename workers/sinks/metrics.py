"""The metrics sink: measurements from the queue into Prometheus.

Measurements may be lost or counted twice: only PostgreSQL counts decisions. A measurement with an
unknown name or label is dropped and counted, never an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import orjson
from prometheus_client import CollectorRegistry, Counter, Histogram

from contracts.ports import Delivery
from contracts.settlement import Ack, Settlement
from contracts.telemetry import METRICS, Metric, MetricType

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class MetricsSink:
    """Applies measurements to collectors in `registry`; tenants outside `tenants` are counted as `other`."""

    def __init__(self, registry: CollectorRegistry, tenants: Collection[str] = ()) -> None:
        """Registers every metric of the closed set."""
        self._tenants = frozenset(tenants)
        self._collectors: dict[str, Counter | Histogram] = {m.name: _collector(m, registry) for m in METRICS.values()}
        self._dropped = Counter("riskfleet_measurements_dropped_total", "Unknown measurements.", registry=registry)

    async def handle(self, deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        """Apply all; never fails."""
        for delivery in deliveries:
            try:
                rows = orjson.loads(delivery.body)
            except orjson.JSONDecodeError:
                self._dropped.inc()
                continue
            for row in rows if isinstance(rows, list) else ():
                self._apply(row)
        return [Ack()] * len(deliveries)

    def _apply(self, row: object) -> None:
        try:
            name, values, labels = _parts(row)
            metric, collector = METRICS[name], self._collectors[name]
            bounded = self._bounded(metric, labels)
            target = collector.labels(**bounded) if bounded else collector
            for value in values:
                if isinstance(target, Counter):
                    target.inc(value)
                else:
                    target.observe(value)
        except (KeyError, TypeError, ValueError):
            self._dropped.inc()

    def _bounded(self, metric: Metric, labels: Mapping[str, str]) -> dict[str, str]:
        bounded = {name: str(labels[name]) for name in metric.labels}
        if "tenant" in bounded and bounded["tenant"] not in self._tenants:
            bounded["tenant"] = "other"
        return bounded


def _collector(metric: Metric, registry: CollectorRegistry) -> Counter | Histogram:
    if metric.type is MetricType.COUNTER:
        return Counter(metric.name, metric.help, metric.labels, registry=registry)
    return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=_BUCKETS)


def _parts(row: object) -> tuple[str, list[float], dict[str, str]]:
    if not isinstance(row, list) or len(row) != 3:
        raise TypeError
    name, values, labels = row
    if not isinstance(name, str) or not isinstance(values, list) or not isinstance(labels, dict):
        raise TypeError
    return name, values, labels
