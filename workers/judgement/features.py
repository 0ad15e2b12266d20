"""Features: the values of an event that a model may name by path.

`attributes.<name>`, `amount.value`, `risk_score`, `text_length`, and of the subject's history
`history.events_1d`, `history.events_30d`, `history.amount_30d`, `history.new_subject`. A value that
the event does not have is None. Amounts are taken as they are; nothing converts currencies.
"""

from __future__ import annotations

from collections.abc import Callable

from contracts.events import Event
from contracts.state import SubjectHistory

Value = str | bool | int | float | None

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


def is_feature(path: str) -> bool:
    """Whether a model may name this path."""
    return path in _PATHS or (path.startswith(_ATTRIBUTE) and len(path) > len(_ATTRIBUTE))


def feature(path: str, event: Event, history: SubjectHistory) -> Value:
    """The value at a path, None when the event has none. Raises KeyError for a path that is no feature."""
    if path.startswith(_ATTRIBUTE):
        return event.attributes.get(path.removeprefix(_ATTRIBUTE))
    return _PATHS[path](event, history)
