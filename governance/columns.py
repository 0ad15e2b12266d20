"""Values as the columns of a table hold them, the same for PostgreSQL and for its twin.

Promises: text without NUL, times in UTC that both the server and its driver can hold. Knows no server.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from contracts.failures import DomainValidationError
from contracts.labels import Label

_NUL: Final = "\x00"
# A day inside what Python can hold: the driver hands a row back in another offset on its way.
_EARLIEST: Final = datetime(1, 1, 2, tzinfo=UTC)
_LATEST: Final = datetime(9999, 12, 30, tzinfo=UTC)


def clean(value: str) -> str:
    """Text for a text column: PostgreSQL refuses NUL, and one such value would fail its whole batch.

    The exact value stays in the `bytea` of the same row.
    """
    return value.replace(_NUL, "�") if _NUL in value else value


def moment(value: str) -> datetime:
    """An RFC 3339 text as aware UTC, held inside years 1 to 9999. Raises ValueError for other text."""
    parsed = datetime.fromisoformat(value)
    try:
        utc = parsed.astimezone(UTC)
    except OverflowError:  # 0001-01-01T00:00:00+01:00 lies before year 1
        return _EARLIEST if parsed.year == 1 else _LATEST
    return min(max(utc, _EARLIEST), _LATEST)


def label_row(label: Label) -> tuple[Any, ...]:
    """A label's columns in the order of the table. Raises DomainValidationError for a time that cannot be read."""
    return (
        label.scope.tenant_id,
        clean(label.label_id),
        clean(label.event_id),
        clean(label.label),
        clean(label.source),
        _time(label.effective_at, "effective_at"),
        _time(label.received_at, "received_at"),
        label.body,
    )


def _time(value: str, field: str) -> datetime:
    try:
        if datetime.fromisoformat(value).tzinfo is not None:
            return moment(value)
    except ValueError:
        pass  # told below, without the value
    raise DomainValidationError(
        "a label's time cannot be read; send it again as RFC 3339 with an offset",
        pointers=((f"/{field}", "must be an RFC 3339 date-time with an offset"),),
    )
