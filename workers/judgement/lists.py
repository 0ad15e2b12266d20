"""Lists of parties and values, kept inside a guardrail version: deny, watch and allow, each entry with its reason.

Promises: an entry holds until its `until` (the event's own clock, `Pins.now`) and not after; deny rejects, watch asks a
person, allow is only said and lifts nothing. As content of a guardrail, a list is versioned, signed, approved by a
second person and pinned by digest. Compares whole values, case and surrounding spaces aside; similar names are
`workers.judgement.screening`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from contracts.events import Event, Moment
from workers.judgement.content import Content

Which = Literal["deny", "watch", "allow"]
LISTED: Mapping[Which, str] = {"deny": "LIST_DENY", "watch": "LIST_WATCH", "allow": "LIST_ALLOW"}


class ListEntry(Content):
    """One value on a list. `field`: `subject.id`, `subject.name`, `counterparty.…` or `attributes.<name>`."""

    list: Which
    field: Annotated[
        str, Field(max_length=160, pattern=r"^((subject|counterparty)\.(id|name)|attributes\.[^\x00-\x1f]+)$")
    ]
    value: Annotated[str, Field(min_length=1, max_length=512)]
    reason: Annotated[str, Field(min_length=1, max_length=256)]
    until: Moment | None = None


ListIndex = Mapping[tuple[str, str], Sequence[ListEntry]]


def index(entries: Sequence[ListEntry]) -> ListIndex:
    """Entries by (field, folded value)."""
    found: dict[tuple[str, str], list[ListEntry]] = {}
    for entry in entries:
        found.setdefault((entry.field, _folded(entry.value)), []).append(entry)
    return found


def listed(entries: ListIndex, which: Which, event: Event, now: str) -> bool:
    """Whether a list names this event at `now` (RFC 3339 in UTC)."""
    moment = datetime.fromisoformat(now)
    return any(
        entry.list == which and (entry.until is None or datetime.fromisoformat(entry.until) > moment)
        for place in _values(event)
        for entry in entries.get(place, ())
    )


def _values(event: Event) -> Iterator[tuple[str, str]]:
    for name, party in (("subject", event.subject), ("counterparty", event.counterparty)):
        if party is not None:
            yield f"{name}.id", _folded(party.id)
            if party.name:
                yield f"{name}.name", _folded(party.name)
    for name, value in event.attributes.items():
        if isinstance(value, str):
            yield f"attributes.{name}", _folded(value)


def _folded(value: str) -> str:
    return value.strip().casefold()
