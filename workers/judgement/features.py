"""Features: the values of an event that a model may name by path; one definition for training and serving.

Of the event itself: `attributes.<name>`, `amount.value`, `risk_score`, `text_length`. Of its subject in the table
`events`: `history.events_1d`, `history.events_30d`, `history.amount_30d`, `history.new_subject`. Of its velocity, for
`<entity>` subject or counterparty, over sliding windows `<w>` 10m, 1h, 1d, 7d, 30d before the event's own time:

    <entity>.count.<w>      events            <entity>.sum|mean|max.<w>         amounts in the event's own currency
    <entity>.distinct.<w>   other parties     <entity>.distinct_attribute.<w>   values of the configured attribute

and, over 1d, 7d, 30d before the time that lies the label delay before the event's: `<entity>.matured.<w>` events,
`<entity>.fraud.<w>` those known as fraud at the event's time, `<entity>.fraud_rate.<w>` their ratio.

A window is (t − w, t]; the event itself does not count, nor does what was observed after it or happened after it, and
of an entity's samples the newest `keep` count at most. A value that the event does not have (a mean of nothing, a
counterparty that is not named) is None. A velocity feature of a history that is not whole raises: it is no number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import fsum
from typing import Final

from contracts.events import Event
from contracts.failures import InvalidModelStateError
from contracts.state import SubjectHistory
from contracts.velocity import DAY_MS, FRAUD, SIDES, EntityVelocity, Observation, Row, Sample, Velocity, VelocityPolicy

Value = str | bool | int | float | None

WINDOWS: Final[dict[str, int]] = {
    "10m": 600_000,
    "1h": 3_600_000,
    "1d": DAY_MS,
    "7d": 7 * DAY_MS,
    "30d": 30 * DAY_MS,
}
"""Lengths in ms, shortest first."""
LABEL_WINDOWS: Final[dict[str, int]] = {name: WINDOWS[name] for name in ("1d", "7d", "30d")}

_ATTRIBUTE = "attributes."
_PATHS: dict[str, Callable[[Event, SubjectHistory], Value]] = {
    "amount.value": lambda event, _: None if event.amount is None else float(event.amount.value),
    "risk_score": lambda event, _: event.risk_score,
    "text_length": lambda event, _: len(event.text or ""),
    "history.events_1d": lambda _, history: history.events_1d,
    "history.events_30d": lambda _, history: history.events_30d,
    "history.amount_30d": lambda _, history: float(history.amount_30d),
    "history.new_subject": lambda _, history: history.first_seen_at is None,
}
_OF_ROW: Final[dict[str, Callable[[Row], Value]]] = {
    "count": lambda row: row[0],
    "sum": lambda row: row[2],
    "mean": lambda row: row[2] / row[1] if row[1] else None,
    "max": lambda row: row[3],
    "distinct": lambda row: row[4],
    "distinct_attribute": lambda row: row[5],
}
_OF_LABELS: Final[dict[str, Callable[[tuple[int, int]], Value]]] = {
    "matured": lambda row: row[0],
    "fraud": lambda row: row[1],
    "fraud_rate": lambda row: row[1] / row[0] if row[0] else None,
}


def _reader(side: str, pick: Callable[[EntityVelocity], Value]) -> Callable[[Velocity], Value]:
    def read(velocity: Velocity) -> Value:
        entity: EntityVelocity | None = getattr(velocity, side)
        return None if entity is None else pick(entity)

    return read


def _window(side: str, place: int, of: Callable[[Row], Value]) -> Callable[[Velocity], Value]:
    return _reader(side, lambda entity: of(entity.windows[place]))


def _labelled(side: str, place: int, of: Callable[[tuple[int, int]], Value]) -> Callable[[Velocity], Value]:
    return _reader(side, lambda entity: of(entity.labels[place]))


_VELOCITY: Final[dict[str, Callable[[Velocity], Value]]] = {
    f"{side}.{name}.{window}": _window(side, place, of)
    for side in SIDES
    for name, of in _OF_ROW.items()
    for place, window in enumerate(WINDOWS)
} | {
    f"{side}.{name}.{window}": _labelled(side, place, of)
    for side in SIDES
    for name, of in _OF_LABELS.items()
    for place, window in enumerate(LABEL_WINDOWS)
}
VELOCITY_FEATURES: Final = tuple(_VELOCITY)
"""Every velocity feature by name."""


def is_feature(path: str) -> bool:
    """Whether a model may name this path."""
    return path in _PATHS or is_velocity(path) or (path.startswith(_ATTRIBUTE) and len(path) > len(_ATTRIBUTE))


def is_velocity(path: str) -> bool:
    """Whether this path needs the velocity facts."""
    return path in _VELOCITY


class HistoryLostError(LookupError):
    """What a feature counts was lost and is not rebuilt yet: no number is better than a small one."""


def feature(path: str, event: Event, history: SubjectHistory, velocity: Velocity | None = None) -> Value:
    """The value at a path, None when the event has none.

    Raises KeyError for a path that is no feature, HistoryLostError for a velocity that is not known as a whole.
    """
    if path.startswith(_ATTRIBUTE):
        return event.attributes.get(path.removeprefix(_ATTRIBUTE))
    if path in _VELOCITY:
        if velocity is None or not velocity.complete:
            raise HistoryLostError(f"{path} is not available: the history that it counts is not whole")
        return _VELOCITY[path](velocity)
    return _PATHS[path](event, history)


def velocity_value(path: str, velocity: Velocity) -> float | None:
    """The velocity feature at a path, None when the event has none. Raises KeyError for a path that is none."""
    value = _VELOCITY[path](velocity)
    assert not isinstance(value, str)  # velocity is counted, never read
    return value


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """The features that a model reads, in its order. Make one with `of`, which refuses unknown names."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str]) -> FeatureSpec:
        """A spec of these names. Raises InvalidModelStateError that names what is unknown or twice there."""
        found = tuple(names)
        unknown = [name for name in found if not is_feature(name)]
        if unknown:
            raise InvalidModelStateError(f"unknown features: {', '.join(name[:64] for name in unknown[:8])}")
        if len(set(found)) != len(found):
            raise InvalidModelStateError("a feature is named twice")
        return cls(found)

    def values(self, event: Event, history: SubjectHistory, velocity: Velocity | None) -> tuple[Value, ...]:
        """One value per name. Raises as `feature` does."""
        return tuple(feature(name, event, history, velocity) for name in self.names)


def velocity_of(seen: Observation, at: int, currency: bytes, policy: VelocityPolicy) -> Velocity:
    """The velocity facts of an event at time `at` (ms since 1900) whose amount is in `currency` (b"" without one).

    Pure: the same observation gives the same facts, in whatever order its samples came to be known.
    """
    since = seen.since_ms
    other = seen.counterparty
    return Velocity(
        epoch=seen.epoch,
        sequence=seen.sequence,
        complete=seen.complete,
        since=None if since is None else datetime.fromtimestamp(since / 1000, UTC).isoformat(),
        subject=_entity(seen.subject, seen.sequence, at, currency, policy),
        counterparty=None if other is None else _entity(other, seen.sequence, at, currency, policy),
    )


def _entity(samples: Sequence[Sample], before: int, at: int, currency: bytes, policy: VelocityPolicy) -> EntityVelocity:
    known = [sample for sample in samples if sample[2] < before][-policy.keep :]
    times = [sample[0] for sample in known]

    def part(start: int, end: int) -> list[Sample]:
        return known[bisect_right(times, start) : bisect_right(times, end)]

    ripe = at - policy.label_delay_ms
    return EntityVelocity(
        windows=tuple(_row(part(at - length, at), currency) for length in WINDOWS.values()),
        labels=tuple(_labels(part(ripe - length, ripe), at) for length in LABEL_WINDOWS.values()),
    )


def _row(samples: Sequence[Sample], currency: bytes) -> Row:
    amounts = [sample[3] for sample in samples if sample[4] == currency] if currency else []
    others = {sample[7] for sample in samples}
    attributes = {sample[8] for sample in samples}
    return (
        len(samples),
        len(amounts),
        fsum(amounts),
        max(amounts, default=None),
        len(others) - (_NOTHING in others),
        len(attributes) - (_NOTHING in attributes),
    )


def _labels(samples: Sequence[Sample], at: int) -> tuple[int, int]:
    return len(samples), sum(sample[5] == FRAUD and sample[6] <= at for sample in samples)


_NOTHING: Final = bytes(8)
